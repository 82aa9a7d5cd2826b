"""`mulligan train`: starts a run from a recipe."""

from __future__ import annotations

import re
import tomllib
import unicodedata
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, endpoint, run
from mulligan.cli.dry_run import dry_run, read_assumptions
from mulligan.cli.out import fail, show
from mulligan.cli.recipes import recipe_file
from mulligan.cli.run_credentials import keep_credential, recall_credential
from mulligan.cli.watch import watch_run
from mulligan.common.errors import DomainError
from mulligan.trainer.client import RunClient
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.wire import validated

_NAME_LENGTH = 40  # of a run id's first part


def train(
    recipe: Annotated[Path | None, typer.Argument(help="The run's settings: a TOML file, or a recipe's name.")] = None,
    run_id: Annotated[str, typer.Option(help="Names the run; made from recipe and time when left out.")] = "",
    override: Annotated[
        list[str] | None, typer.Option("--set", help="A setting as NAME=VALUE, over the recipe's; repeatable.")
    ] = None,
    watch: Annotated[bool, typer.Option(help="Show progress until the run ends.")] = True,
    estimate: Annotated[
        bool, typer.Option("--dry-run", help="Start nothing; estimate memory, tokens and time on 1, 2 and 8 GPUs.")
    ] = False,
    assume: Annotated[
        list[str] | None,
        typer.Option(help="What --dry-run assumes, as NAME=VALUE: gpu, utilisation, turns, …; repeatable."),
    ] = None,
    trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """Start a training run from a recipe, from --set options, or both. Other settings have the paper's values.

    Example: `mulligan train frozenlake-3x3 --set steps=20 --set algorithm.memory_entries=0`
    """
    settings = read_settings(recipe, override or [])
    if estimate:
        dry_run(settings, read_assumptions(assume or []))
        return
    if assume:
        fail("--assume: expected together with --dry-run", 2)
    name = run_id or f"{_plain_name(recipe.stem if recipe else settings.environment)}-{datetime.now():%Y%m%d-%H%M%S}"
    run(_train(name, settings, watch, trainer))


async def _train(run_id: str, settings: RunSettings, watch: bool, trainer: str) -> None:
    client = RunClient(endpoint(trainer))
    try:
        recall_credential(client, trainer, run_id)  # of a run that is there, a repeated call gets it again
        await client.start(run_id, settings)
        keep_credential(client, trainer, run_id)
    finally:
        await client.close()
    show(f"run {run_id}")
    if watch:
        await watch_run(run_id, trainer)


def _plain_name(text: str) -> str:
    """The text with only the characters that a run id may have: `Übung 1` gives `Ubung-1`."""
    ascii_only = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_only).strip("._-")[:_NAME_LENGTH].rstrip("._-") or "run"


def read_settings(recipe: Path | None, overrides: list[str]) -> RunSettings:
    """The settings of a recipe and overrides. Ends the program with one line if they are wrong."""
    try:
        plain: dict[str, Any] = tomllib.loads(recipe_file(recipe).read_text(encoding="utf-8")) if recipe else {}
        for override in overrides:
            _override(plain, override)
        return validated(RunSettings, plain)
    except (OSError, tomllib.TOMLDecodeError, ValueError, DomainError) as error:
        fail(f"{recipe or 'settings'}: {error}", 2)


def _override(plain: dict[str, Any], override: str) -> None:
    """`a.b=VALUE`; VALUE is TOML, or a string when it is none."""
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ValueError(f"--set {override}: expected NAME=VALUE")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = name.split(".")
    table = plain
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {override}: {part} is no table")
    table[last] = value
