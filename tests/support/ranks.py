"""The processes of a learner, found below the torchrun that started them."""

from __future__ import annotations

from pathlib import Path

from mulligan.testing.processes import ServiceProcess


def pids(service: ServiceProcess) -> dict[int, int]:
    """The process ids by rank, of those that run now."""
    assert service.process is not None
    parent = service.process.pid
    found: dict[int, int] = {}
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        found |= {int(one.removeprefix(b"RANK=")): int(child) for one in variables if one.startswith(b"RANK=")}
    return found
