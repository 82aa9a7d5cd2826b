"""Opens the browser of experiences in the terminal, if it is one and the extra `browse` is installed."""

from __future__ import annotations

import os
import sqlite3
import sys
from pathlib import Path

import typer

from mulligan.cli.connection import endpoint, run
from mulligan.cli.out import fail, note
from mulligan.cli.runs import whole_run_id
from mulligan.common.extras import MissingExtra
from mulligan.trainer.client import RunClient


def on_a_terminal() -> bool:
    """Whether a person looks and has keys. A terminal that calls itself dumb can only print."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def browse(source: str, trainer: str) -> bool:
    """Returns when the person quits; False where it cannot be opened, having said why."""
    try:
        from mulligan.console.index import ExperienceIndex
        from mulligan.console.reading import index_file
        from mulligan.console.terminal.app import ExperienceBrowser, warnings_kept
    except ImportError as error:
        if (error.name or "").startswith("mulligan"):
            raise
        note(f"the browser of experiences {MissingExtra('browse', error)}")
        return False
    folder = Path(source) if Path(source).is_dir() else run(_folder(source, trainer))
    if not (folder / "run.json").is_file():
        note(f"without the browser: {folder} is not a run's folder on this machine")
        return False
    try:
        file = index_file(folder.resolve())
        index = ExperienceIndex(file)
    except (sqlite3.Error, OSError, RuntimeError) as error:
        fail(f"the index of the experiences cannot be written ({error}): XDG_CACHE_HOME may name another folder", 2)
    with warnings_kept() as warnings:
        app = ExperienceBrowser(folder.resolve(), index)
        app.run(mouse=False)  # the terminal's own selection goes on working
    index.close()
    for warning in warnings:
        note(f"warning: {warning}")
    if app.return_code:
        raise typer.Exit(app.return_code)
    return True


async def _folder(run_id: str, trainer: str) -> Path:
    """The folder of a trainer's run, as the trainer names it."""
    client = RunClient(endpoint(trainer))
    try:
        whole = await whole_run_id(client, run_id)
        return Path(next(info.folder for info in await client.runs() if info.run_id == whole))
    finally:
        await client.close()
