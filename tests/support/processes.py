"""Processes of the operating system, as tests look at them."""

from __future__ import annotations

import os
from pathlib import Path


def runs(pid: int) -> bool:
    """Whether a process is there; one that has ended and was not waited for does not run."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def identity(pid: int, seen_by: int | str = "self") -> str:
    """What a process is called in every pid namespace: the namespace of the process `seen_by`, and the number there."""
    return f"{os.stat(f'/proc/{seen_by}/ns/pid').st_ino}-{pid}"


def number_of(process: str) -> int | None:
    """The number, in the namespace of the caller, of the process with an identity. None when it has ended."""
    namespace, _, number = process.partition("-")
    for entry in os.listdir("/proc"):
        try:
            if entry.isdecimal() and f"{os.stat(f'/proc/{entry}/ns/pid').st_ino}" == namespace:
                numbers = Path(f"/proc/{entry}/status").read_text().split("NSpid:")[1].split("\n")[0].split()
                if numbers[-1] == number and runs(int(entry)):
                    return int(entry)
        except OSError:  # it has ended
            continue
    return None


def inside_runs(process: str) -> bool:
    """As `runs`, of the process with an identity."""
    return number_of(process) is not None
