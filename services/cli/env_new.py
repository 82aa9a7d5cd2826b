"""`mulligan env new`: writes an environment that works, and its test, to be changed into one's own."""

from __future__ import annotations

import keyword
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from mulligan.cli.connection import program
from mulligan.cli.out import fail, show
from mulligan.env.envs import ENVIRONMENTS

_TEMPLATE = Path(__file__).parent / "template" / "my_game.py"
_TEST = '''\
"""my_game keeps what an environment promises. Run by: python -m pytest test_my_game.py"""

from __future__ import annotations

from my_game import Settings, create

from mulligan.conformance import check_environment
from mulligan.env import Split

# CHANGE: answers that mean something in your environment. They are played among random and hostile ones.
ACTIONS = ["```10```", "I think it is ```3```", "```17```"]


def test_it_keeps_what_an_environment_promises() -> None:
    report = check_environment("my_game", known=ACTIONS)
    assert report.conforms, report.problems()


def test_it_can_be_won() -> None:
    game = create("my_game", Settings(highest=3))
    (task,) = game.list_tasks(Split.TRAIN, 0, 1)
    rewards = [game.start(task.task_id).step(f"```{guess}```").reward for guess in (1, 2, 3)]
    assert sorted(rewards) == [0.0, 0.0, game.info.max_reward]
'''


def new(
    name: Annotated[str, typer.Argument(help="A Python identifier, such as `my_game`: the file is NAME.py.")],
    folder: Annotated[Path, typer.Option(help="Where the files go.", file_okay=False)] = Path(),
) -> None:
    """Write an environment and its test: a small game that works, with remarks on what to change.

    Example: `mulligan env new word_chain`
    """
    problem = _problem(name)
    if problem:
        fail(f"{name!r}: {problem}", 2)
    texts = {f"{name}.py": _TEMPLATE.read_text(encoding="utf-8"), f"test_{name}.py": _TEST}
    class_name = _class_name(name, texts[f"{name}.py"])
    if taken := [file for file in texts if (folder / file).exists()]:
        fail(f"{folder / taken[0]} is there already; nothing was written")
    shown_title = name.replace("_", " ").strip().capitalize()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            with (folder / file).open("x", encoding="utf-8") as opened:
                opened.write(
                    text.replace("My game:", f"{shown_title}:")
                    .replace("my-game", name.strip("_").replace("_", "-"))
                    .replace("my_game", name)
                    .replace("MyGame", class_name)
                )
            show(f"wrote {folder / file}")
    except OSError as error:
        fail(error, 2)
    steps = [f"cd {shlex.quote(str(folder))}"] if folder != Path() else []
    steps += [
        f"{program()} env play {name}",
        f"{program()} env check {name}",
        f"{shlex.quote(sys.executable)} -m pytest test_{name}.py",
    ]
    show("\n  ".join(["\nNext:", *steps]))


def _class_name(name: str, text: str) -> str:
    """The name in CamelCase, with a prefix if the text already uses it."""
    joined = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    is_free = joined.isidentifier() and not re.search(rf"\b{joined}\b", text)
    return joined if is_free else f"Game{joined}"


def _problem(name: str) -> str:
    """Why a module cannot have this name; empty if it can."""
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        return "expected a Python identifier: letters, digits and underscores, no keyword, such as my_game"
    if not name.strip("_"):
        return "expected a letter or digit in it, such as my_game"
    if name in ENVIRONMENTS.names:
        return "an environment of mulligan, or one that is installed, has this name; choose another"
    if name in sys.builtin_module_names or name in sys.stdlib_module_names or _is_installed(name):
        return "a module that is installed has this name; choose another"
    return ""


def _is_installed(name: str) -> bool:
    here = Path.cwd()
    paths = sys.path
    try:
        sys.path = [path for path in paths if Path(path).resolve() != here]
        return find_spec(name) is not None
    finally:
        sys.path = paths
