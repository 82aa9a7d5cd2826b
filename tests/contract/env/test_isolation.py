"""What protects from an untrusted environment: by root and by others, with namespaces and where none are allowed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from mulligan.common.types import Split
from mulligan.env.config import EnvSettings

NAMESPACES = ["user", "mount", "ipc", "network", "pid"]
NOBODY = 65534
ACTIONS = ["reach", "connect", "capabilities", "bomb", "thread", "kernel setting", "shared memory"]


def in_sandbox(user: int, *, forbidden: bool, folder: Path) -> dict[str, object]:
    folder.chmod(0o777)
    actions = [*ACTIONS, "threads"] if user else ACTIONS  # the kernel does not limit root's
    arguments = [sys.executable, "-m", "tests.support.fenced", f"{user}", f"{forbidden:d}", str(folder), *actions]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found: dict[str, object] = json.loads(ended.stdout)
    return found


def has_namespaces() -> bool:
    return subprocess.run(["unshare", "--user", "--net", "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that other users may write to."""
    with TemporaryDirectory() as path:
        yield Path(path)


def nobody_may_run(folder: Path) -> bool:
    """Whether root can run this Python as another user; one in root's folder, it cannot."""
    paths = (Path(sys.executable), Path(os.path.realpath(sys.executable)), folder)
    return os.getuid() == 0 and all(place.stat().st_mode & 1 for path in paths for place in path.parents)


@pytest.mark.parametrize("forbidden", [False, True])
@pytest.mark.parametrize("user", ["own", "nobody"])
def test_it_cannot_reach_what_is_outside(folder: Path, user: str, forbidden: bool) -> None:
    if not forbidden and not has_namespaces():
        pytest.skip("this kernel allows no user namespaces to this user")
    if user == "nobody" and not nobody_may_run(folder):
        pytest.skip("only root can become another user, and this Python is not open to others")
    number = os.getuid() if user == "own" else NOBODY
    found = in_sandbox(number, forbidden=forbidden, folder=folder)
    assert found["namespaces"] == ([] if forbidden else NAMESPACES)
    assert found["lacks"] == ("unshare: Operation not permitted" if forbidden else "")
    assert found["reach"] == ""
    assert found["connect"] == "Operation not permitted"
    assert found["capabilities"] == "0" * 16
    assert found["bomb"] == "no more: Operation not permitted"
    assert found["thread"] == "threaded"
    if number:
        assert 200 < int(str(found["threads"])) <= 256
        assert found["kernel setting"] in ("Permission denied", "Read-only file system")
    if not forbidden:
        assert found["kernel setting"] == "Read-only file system"
        assert found["shared memory"] == "No space left on device"


KINDS: dict[str, dict[str, object]] = {
    "gymnasium": {"kind": "gymnasium", "id": "FrozenLake-v1", "max_reward": 1.0},
    "textarena": {"kind": "textarena", "id": "TicTacToe-v0", "players": 2, "max_steps": 12},
    "reasoning_gym": {"kind": "reasoning_gym", "datasets": ["leg_counting"], "subprocesses": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_environments_of_others_play_in_it(name: str) -> None:
    environment = EnvSettings(environments={name: KINDS[name] | {"untrusted": True}}).create_environments()[name]
    try:
        assert not environment.info.unavailable
        (task,) = environment.list_tasks(Split.TRAIN, 0, 1)
        episode = environment.start(task.task_id)
        assert episode.observation and episode.step("1").observation
    finally:
        environment.close()  # type: ignore[attr-defined]  # an environment in processes has it
