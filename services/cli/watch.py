"""`mulligan watch`: a run's progress, live."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, endpoint, run
from mulligan.cli.progress import show
from mulligan.cli.runs import whole_run_id
from mulligan.trainer.client import RunClient
from mulligan.trainer.folder import RunState


def watch(
    run_id: Annotated[str, typer.Argument(help="As `mulligan runs` lists it; a unique beginning is enough.")],
    trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """Show a run's progress from its start, then live until it ends. Ctrl-C leaves the run going.

    Example: `mulligan watch frozenlake-1`
    """
    run(watch_run(run_id, trainer))


async def watch_run(run_id: str, trainer: str) -> None:
    client = RunClient(endpoint(trainer))
    try:
        whole = await whole_run_id(client, run_id)
        state = await show(await client.get(whole), client.watch(whole), lambda: client.get(whole))
    finally:
        await client.close()
    if state is not None and state.state == RunState.FAILED:
        sys.exit(1)
