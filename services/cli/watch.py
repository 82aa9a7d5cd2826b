"""`mulligan watch`: a run's progress, live."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from services.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, endpoint, run
from services.cli.progress import show
from services.trainer.client import RunClient
from services.trainer.folder import RunState


def watch(
    run_id: Annotated[str, typer.Argument(help="As `mulligan runs` lists it.")],
    trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """Show a run's progress from its start, then live until it ends. Ctrl-C leaves the run going.

    Example: `mulligan watch frozenlake-1`
    """
    run(watch_run(run_id, trainer))


async def watch_run(run_id: str, trainer: str) -> None:
    client = RunClient(endpoint(trainer))
    try:
        state = await show(await client.get(run_id), client.watch(run_id), Console())
    finally:
        await client.close()
    if state is not None and state.state == RunState.FAILED:
        sys.exit(1)
