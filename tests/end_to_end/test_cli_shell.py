"""The command in a shell and in a pipe: its version, completion of words, and signs of life."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mulligan.testing.loop import Loop
from mulligan.testing.processes import ServiceProcesses
from tests.support.paths import ROOT

ROOTS = os.pathsep.join([str(ROOT), str(ROOT / "src")])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder, with a program `mulligan` in its `bin`."""
    program = tmp_path / "bin" / "mulligan"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mulligan.cli "$@"\n')
    program.chmod(0o755)
    return tmp_path


def bash(home: Path, script: str) -> str:
    """What the script prints, in a bash whose home and path this is."""
    path = os.pathsep.join([str(home / "bin"), os.environ["PATH"]])
    ended = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "HOME": str(home), "PATH": path, "PYTHONPATH": ROOTS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def completed(home: Path, prepare: str, *words: str) -> list[str]:
    """What bash offers for the last of the words, once it has run `prepare`."""
    typed = " ".join(words)
    ask = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _mulligan_completion mulligan"
    return bash(home, f'{prepare}; {ask}; printf "%s\\n" "${{COMPREPLY[@]}}"').split()


def test_the_version_is_that_of_the_package(home: Path) -> None:
    assert bash(home, "mulligan --version") == f"mulligan {version('mulligan')}\n"


def test_bash_completes_commands_as_shown_and_as_installed(home: Path) -> None:
    shown = 'eval "$(mulligan --show-completion)"'
    assert completed(home, shown, "mulligan", "exp") == ["experiences", "export"]
    assert completed(home, shown, "mulligan", "policy", "ro") == ["rollback"]
    said = bash(home, "mulligan --install-completion; true")
    assert "bash completion installed in" in said
    assert completed(home, 'source "$HOME/.bashrc"', "mulligan", "memory", "f") == ["forget"]


def test_a_run_that_waits_shows_in_a_pipe_that_it_goes_on(services: ServiceProcesses, tmp_path: Path) -> None:
    loop = Loop.start(services, tmp_path / "loop")
    assert loop.env.process is not None
    loop.env.process.send_signal(signal.SIGSTOP)  # the run cannot begin, for as long as it takes
    training = subprocess.Popen(
        [sys.executable, "-m", "mulligan.cli", "train", "frozenlake-3x3", "--trainer", loop.trainer.address],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ROOTS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert training.stderr is not None
    try:
        while "0/200 steps done; now opening the environments …" not in training.stderr.readline():
            assert training.poll() is None
    finally:
        loop.env.process.send_signal(signal.SIGCONT)
        training.kill()
        training.wait()
        training.stderr.close()
