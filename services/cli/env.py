"""`mulligan env`: write an environment, check it, play it."""

from __future__ import annotations

import os
import sys

import typer

from mulligan.cli.env_check import check
from mulligan.cli.env_new import new
from mulligan.cli.env_play import play

env = typer.Typer(help="Write an environment, check it, play it: `new`, `check`, `play`.", no_args_is_help=True)


@env.callback()
def find_here() -> None:
    """Adds the current folder to the end of the module path, so that its modules can be named as kinds."""
    sys.path.append(os.getcwd())


env.command("new")(new)
env.command("check")(check)
env.command("play")(play)
