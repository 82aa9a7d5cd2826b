"""The tutorial: what it says to write and to type works with the wheel alone, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.wheel import Installed, install, surroundings, up

PAGE = ROOT / "docs" / "tutorial.md"
UP = "mulligan up --config mulligan.toml"
# The page's models and runs, made small. Each of these is on the page.
SMALL = {
    "python make_model.py small": "python make_model.py small 64 3",
    "python make_model.py larger 96": "python make_model.py larger 96 3",
    "steps = 60": "steps = 2",
    "tasks_per_step = 16": "tasks_per_step = 4",
}


def page() -> str:
    text = PAGE.read_text()
    for written, small in SMALL.items():
        assert written in text, written
        text = text.replace(written, small)
    return text


def blocks(text: str) -> list[tuple[str, str, str]]:
    """Of each block: the file that it is, or nothing; its language; its text. In the page's order."""
    return re.findall(r"(?:^`([\w.]+)`:\n\n)?^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def paste(installed: Installed, commands: str, variables: dict[str, str]) -> str:
    """What bash prints; fails at the first command that does."""
    programs = os.pathsep.join([str(installed.python.parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=installed.folder,
        env={**surroundings(), **variables, "PATH": programs},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(900)  # for what hangs, not for a machine that is busy
def test_the_tutorial_from_its_first_line_to_its_last(tmp_path: Path) -> None:
    installed = install(tmp_path)
    variables: dict[str, str] = {}
    printed = ""
    with ExitStack() as running:
        for file, language, text in blocks(page()):
            if file:
                (installed.folder / file).write_text(text)
            elif language == "sh" and text.strip() == UP:
                variables = running.enter_context(up(installed))
            elif language == "sh":
                printed += paste(installed, text, variables)
            else:
                assert language == "text", f"neither a file, nor commands, nor what is printed: {text}"
    assert "doors: nothing is wrong" in printed
    assert "run first: completed" in printed
    assert "run second: completed" in printed
    assert "run plain: completed" in printed
    assert "first-s0-t0-r0  (doors train/" in printed
    assert re.search(r"^step 1: \d+ of 16 solved at once, \d+ of \d+ with a reflection$", printed, re.MULTILINE)
    assert "policy actor serves larger" in printed
