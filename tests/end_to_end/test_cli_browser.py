"""`mulligan experiences RUN` on a real terminal opens the browser and leaves the terminal as it was; else it prints."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.testing.recorded_runs import write_run
from tests.support.paths import IMPORT_ROOTS
from tests.support.terminal import on_terminal, without

LEFT = "\x1b[?1049l"  # the alternate screen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_run(tmp_path_factory.mktemp("runs"), "run").path)


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path / "cache")}


def printed(folder: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mulligan.cli", "experiences", folder, *options]
    environment = {**os.environ, "PYTHONPATH": IMPORT_ROOTS}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_it_opens_and_q_leaves_the_terminal_as_it_was(folder: str, cache: dict[str, str]) -> None:
    with on_terminal("experiences", folder, environment=cache) as terminal:
        terminal.wait_for("12 experiences")
        assert terminal.settings != terminal.before, "it reads keys one by one"
        terminal.press("j\r")
        terminal.wait_for("fell into hole")
        terminal.press("q")
        assert terminal.status() == 0
        assert terminal.settings == terminal.before
        end = terminal.sent.rpartition(LEFT)
        assert end[1] and "\x1b[?25h" in terminal.sent and "Traceback" not in terminal.sent
        assert "═══" not in terminal.sent, "nothing is printed as well"
        assert "\x1b[48;2;" not in terminal.sent and "\x1b[38;2;" not in terminal.sent, "the terminal's own colours"
        assert ";40m" not in terminal.sent, "no black ground on a light terminal"


@pytest.mark.long
def test_a_run_of_a_trainer_by_the_beginning_of_its_id(
    shared_services: ServiceProcesses, cache: dict[str, str], tmp_path: Path
) -> None:
    loop = Loop.start(shared_services, tmp_path)
    asyncio.run(loop.train("a-run-of-a-trainer", small_run(steps=1, checkpoint_every=1)))
    environment = {**cache, "MULLIGAN_CLI_TRAINER": loop.trainer.address}
    with on_terminal("experiences", "a-run", environment=environment) as terminal:
        terminal.wait_for("first ")  # a row: its journal is read
        terminal.press("\r")
        terminal.wait_for("a-run-of-a-trainer-s0-t0-r0")
        terminal.press("q")
        assert terminal.status() == 0
    with on_terminal("experiences", "b-run", environment=environment, columns=400) as terminal:
        assert terminal.status() == 1 and "no run 'b-run'" in terminal.sent


def test_ctrl_c_quits_it_too(folder: str, cache: dict[str, str]) -> None:
    with on_terminal("experiences", folder, environment=cache) as terminal:
        terminal.wait_for("12 experiences")
        terminal.press("\x03")
        assert terminal.status() == 0 and terminal.settings == terminal.before


@pytest.mark.long
def test_in_a_pipe_and_with_options_it_prints(folder: str, cache: dict[str, str]) -> None:
    piped = printed(folder)
    assert piped.returncode == 0 and piped.stderr == ""
    assert piped.stdout.count("═══") == 3 and piped.stdout.startswith(
        "═══ run-s0-t0-r0  (frozenlake-3x3 train/00000, erl)"
    )
    with on_terminal("experiences", folder, environment={**cache, "TERM": "dumb"}, columns=400) as terminal:
        assert terminal.status() == 0 and terminal.sent.replace("\r\n", "\n") == piped.stdout
    for options in (("--limit", "3"), ("--step", "0"), ("--limit", "3", "--json")):
        with on_terminal("experiences", folder, *options, environment=cache, columns=400) as terminal:
            assert terminal.status() == 0 and LEFT not in terminal.sent
            assert terminal.sent.replace("\r\n", "\n") == printed(folder, *options).stdout


def test_without_the_extra_it_prints_and_says_which_one(folder: str, tmp_path: Path) -> None:
    environment = without("textual", tmp_path / "hidden")
    with on_terminal("experiences", folder, environment=environment, columns=400) as terminal:
        assert terminal.status() == 0
        first, *others = terminal.sent.replace("\r\n", "\n").splitlines()
        assert "needs the extra 'browse'" in first and "pip install -e '.[browse]'" in first
        assert "\n".join([*others, ""]) == printed(folder).stdout


def test_a_cache_that_cannot_be_written(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    with on_terminal("experiences", folder, environment=environment, columns=400) as terminal:
        assert terminal.status() == 2 and "XDG_CACHE_HOME" in terminal.sent and "Traceback" not in terminal.sent
