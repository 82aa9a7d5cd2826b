"""Disks and memory: room, and whether files can be written."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mulligan.cli.doctor.finding import Finding, Topic
from mulligan.common.disk import free_bytes

_LITTLE = 2 * 10**9  # bytes: less than a few checkpoints of a small model
_NONE = 100 * 10**6  # bytes: a service stops to write soon
_PROBE = b"\0" * 65_536
_SHARED_LITTLE = 256 * 10**6  # bytes; containers have 64 MB unless they are told otherwise
_MEMORY_LITTLE = 10**9  # bytes


def check_folder(topic: Topic, folder: Path, needed: int = 0) -> Finding:
    """Writes a file and removes it at once, in the folder or, if it does not exist yet, in the one that would get it.
    `needed` bytes are known to be written there."""
    there = nearest(folder)
    try:
        _write(there)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return topic.problem(
                f"The disk of {folder} is full: a file of {len(_PROBE)} bytes has no room.", _room(folder)
            )
        said = f"Nothing can be written to {there}: {error.strerror}."
        return topic.problem(said, "Change its owner or its mode, or choose another folder.")
    return judge_room(topic, folder, free_bytes(there), needed)


def judge_room(topic: Topic, folder: Path, free: int, needed: int) -> Finding:
    if free < max(needed, _NONE):
        wanted = f", and about {gigabytes(needed)} are needed" if needed else ""
        return topic.problem(f"{gigabytes(free)} are free on the disk of {folder}{wanted}.", _room(folder))
    if free < _LITTLE:
        return topic.warning(f"Only {gigabytes(free)} are free on the disk of {folder}.", _room(folder))
    return topic.ok(f"{gigabytes(free)} are free on the disk of {folder}, and it can be written.")


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """The processes of a learner and of an engine on GPUs pass tensors there."""
    topic = Topic("memory", str(folder))
    if not folder.is_dir():
        return topic.skipped("This machine has none.")
    free = shutil.disk_usage(folder).free
    if free < _SHARED_LITTLE:
        said = f"Only {gigabytes(free)} are free in {folder}, where processes on GPUs pass tensors."
        return topic.warning(
            said, "Give a container more, as `docker run --shm-size=8g`, or remove what is left there."
        )
    return topic.ok(f"{gigabytes(free)} are free.")


def check_memory() -> Finding:
    topic = Topic("memory", "machine")
    available = available_memory()
    if available is None:
        return topic.skipped("This system does not say how much memory is free.")
    if available < _MEMORY_LITTLE:
        said = f"Only {gigabytes(available)} of memory are free."
        return topic.warning(said, "End other programs, or choose a smaller model.")
    return topic.ok(f"{gigabytes(available)} of memory are free.")


def available_memory(group: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that programs can take: of the machine, or of the container's limit if that is less."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        found = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # `max`: there is no limit
        return found
    return min(found, max(0, limit - used))


def cache_folders(environment: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """Where Mulligan, the libraries of the hub, and programs that need a place for a moment write."""
    home = Path.home()
    caches = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    hub = environment.get("HF_HUB_CACHE") or Path(environment.get("HF_HOME") or caches / "huggingface") / "hub"
    return {"cache": caches / "mulligan", "hub cache": Path(hub), "temporary": Path(tempfile.gettempdir())}


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next((one for one in (folder, *folder.absolute().parents) if os.path.isdir(one)), Path("/"))


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name where the system can do that
        left = memoryview(_PROBE)
        while left:
            left = left[os.write(file.fileno(), left) :]


def _room(folder: Path) -> str:
    return f"Make room there, or choose a folder on another disk instead of {folder}."
