"""An environment whose agents make it do what no environment should: `kind = "tests.support.hostile"`.

The action is what it does. It notes where it runs in `folder`, so that a test sees what is left of it. It names
processes by their identity (`tests.support.processes`), as they have a pid namespace of their own.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mulligan.env.base import EnvironmentInfo, Split, StepResult, TaskInfo, read_settings
from mulligan.env.prompts import generic_prompts
from tests.support.processes import identity

MEGABYTE = 2**20


@dataclass(frozen=True, slots=True)
class HostileSettings:
    folder: str
    at_load: str = ""  # what it does while it is loaded

    def __post_init__(self) -> None:
        if self.at_load == "refuses":
            raise ValueError("at_load: it refuses")


def _bomb() -> str:
    """Every process starts another, until it cannot."""
    try:
        while True:
            os.fork()
    except OSError as error:
        return f"no more: {error.strerror}"


def _sockets() -> list[int]:
    found = []
    for descriptor in range(3, 64):
        try:
            fcntl.fcntl(descriptor, fcntl.F_GETFD)
            socket.socket(fileno=os.dup(descriptor)).close()
        except OSError:
            continue
        found.append(descriptor)
    return found


def _garbage() -> str:
    for descriptor in _sockets():
        os.write(descriptor, b"\x00\x00\x00\x04junk")
    return "written"


def _announce() -> str:
    for descriptor in _sockets():
        os.write(descriptor, b"\xff\xff\xff\xff")
    return "announced"


def _hang_up() -> str:
    for descriptor in _sockets():
        os.close(descriptor)
    time.sleep(60)
    return ""


def _spin() -> str:
    while True:
        pass


def _hang() -> str:
    time.sleep(60)
    return ""


def _recurse() -> str:
    return _recurse() + "!"


def _kill_parent() -> str:
    os.kill(os.getppid(), 9)
    return ""


def _chatter() -> str:
    print("x" * MEGABYTE, flush=True)
    os.write(1, b"\xff" * MEGABYTE)
    os.write(2, b"\xff" * MEGABYTE)
    return "said"


def _child() -> str:
    sleeping = subprocess.Popen(["sleep", "60"])
    return identity(sleeping.pid)


def _apart() -> str:
    """A process in a session of its own."""
    return identity(subprocess.Popen(["sleep", "60"], start_new_session=True).pid)


def _orphan() -> str:
    """A process whose parent is gone."""
    command = "sleep 60 >/dev/null 2>&1 & echo $!"
    return identity(int(subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, check=True).stdout))


def _variables() -> str:
    with open("/proc/self/environ", encoding="utf-8") as file:
        names = [entry.partition("=")[0] for entry in file.read().split("\0") if entry]
    return " ".join(sorted(names))


def _thread() -> str:
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append("threaded"))
    thread.start()
    thread.join()
    return said[0]


def _fill_shared_memory() -> str:
    """Writes twice the limit of its memory to files that lie in memory."""
    path = Path("/dev/shm/hostile")
    try:
        with path.open("wb") as file:
            for _ in range(256):
                file.write(bytes(MEGABYTE))
    except OSError as error:
        return f"{error.strerror}"
    finally:
        path.unlink()
    return "written"


def _reach_memory() -> str:
    """Which of its relatives' memory it can write to: of what started it, of the server, of other episodes."""
    host = os.getppid()
    server = Path(f"/proc/{host}/status").read_text().split("PPid:")[1].split()[0]
    siblings = Path(f"/proc/{host}/task/{host}/children").read_text().split()
    found = []
    for process in {str(host), server, *siblings} - {"0", str(os.getpid())}:
        try:
            with open(f"/proc/{process}/mem", "r+b"):
                found.append(process)
        except OSError:
            continue
    return " ".join(found)


def _threads() -> str:
    """How many threads it gets of 300."""
    threading.stack_size(32768)
    release = threading.Event()
    count = 0
    try:
        for _ in range(300):
            threading.Thread(target=release.wait, daemon=True).start()
            count += 1
    except RuntimeError:
        pass
    release.set()
    return f"{count}"


def _connect() -> str:
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=5)
    except OSError as error:
        return f"{error.strerror}"
    return "connected"


def _kernel_setting() -> str:
    """Opens a setting for writing, and leaves it as it is."""
    try:
        os.close(os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY))
    except OSError as error:
        return f"{error.strerror}"
    return "opened"


def _capabilities() -> str:
    return Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0]


def _raise() -> str:
    raise RuntimeError("the ice broke")


ACTIONS: dict[str, Callable[[], str]] = {
    "raise": _raise,
    "sys.exit": lambda: sys.exit("bye"),
    "exit": lambda: os._exit(3),
    "segfault": lambda: ctypes.string_at(0).decode(),
    "abort": os.abort,
    "hang": _hang,
    "spin": _spin,
    "eat": lambda: str(len(bytearray(2048 * MEGABYTE))),
    "nibble": lambda: str(len([bytearray(MEGABYTE) for _ in range(2048)])),
    "bomb": _bomb,
    "garbage": _garbage,
    "announce": _announce,
    "hang up": _hang_up,
    "huge": lambda: "x" * (17 * MEGABYTE),
    "surrogate": lambda: "\ud800",
    "child": _child,
    "apart": _apart,
    "orphan": _orphan,
    "kill parent": _kill_parent,
    "chatter": _chatter,
    "variables": _variables,
    "thread": _thread,
    "recurse": _recurse,
    "shared memory": _fill_shared_memory,
    "reach": _reach_memory,
    "threads": _threads,
    "connect": _connect,
    "kernel setting": _kernel_setting,
    "capabilities": _capabilities,
    "pid": lambda: f"{identity(os.getpid())} {identity(os.getppid())}",
    "some memory": lambda: str(len(bytearray(32 * MEGABYTE))),
}


class HostileEpisode:
    def __init__(self, task_id: str, folder: str) -> None:
        (Path(folder) / identity(os.getpid())).touch()
        self.observation = ACTIONS.get(task_id, lambda: "begin")()
        self.steps: list[str] = []

    def step(self, action: str) -> StepResult:
        self.steps.append(action)
        shown = ACTIONS.get(action, lambda: "-".join(self.steps))()
        return StepResult(shown, action[:20])


class Hostile:
    def __init__(self, name: str, settings: HostileSettings) -> None:
        self._folder = settings.folder
        (Path(self._folder) / identity(os.getpid())).touch()
        ACTIONS.get(settings.at_load, str)()
        self.info = EnvironmentInfo(
            name=name,
            description="does what it is told",
            prompts=generic_prompts("Name an action.", "Its name."),
            max_steps=100,
            max_reward=1.0,
            deterministic=False,
            task_counts=dict.fromkeys(Split, 3),
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        if split is Split.TEST:
            ACTIONS["exit"]()
        return [TaskInfo(f"task {number}", split, 1.0) for number in range(offset, min(3, offset + limit))]

    def start(self, task_id: str) -> HostileEpisode:
        return HostileEpisode(task_id, self._folder)


def create(name: str, settings: Mapping[str, object]) -> Hostile:
    return Hostile(name, read_settings(HostileSettings, settings))
