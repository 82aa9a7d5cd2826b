"""`mulligan stop` and `mulligan resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, endpoint, run
from services.cli.watch import watch_run
from services.trainer.client import RunClient

RunId = Annotated[str, typer.Argument(help="As `mulligan runs` lists it.")]
AcceptEnvironment = Annotated[
    bool,
    typer.Option("--accept-environment", help="Go on although the environment is not the one that the run began in."),
]


def stop(run_id: RunId, trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"]) -> None:
    """Stop a run after the step that it is at. It can be resumed.

    Example: `mulligan stop frozenlake-1`
    """
    run(_stop(run_id, trainer))
    print(f"stopping; go on with: mulligan resume {run_id}")


def resume(
    run_id: RunId,
    watch: Annotated[bool, typer.Option(help="Show progress until the run ends.")] = True,
    accept_environment: AcceptEnvironment = False,
    trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """Go on with a stopped or failed run.

    Example: `mulligan resume frozenlake-1`
    """
    run(_resume(run_id, watch, accept_environment, trainer))


async def _stop(run_id: str, trainer: str) -> None:
    client = RunClient(endpoint(trainer))
    try:
        await client.stop(run_id)
    finally:
        await client.close()


async def _resume(run_id: str, watch: bool, accept_environment: bool, trainer: str) -> None:
    client = RunClient(endpoint(trainer))
    try:
        await client.resume(run_id, accept_environment=accept_environment)
    finally:
        await client.close()
    if watch:
        await watch_run(run_id, trainer)
