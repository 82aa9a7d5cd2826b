"""`mulligan stop` and `mulligan resume`."""

from __future__ import annotations

from typing import Annotated

import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, command, endpoint, run
from mulligan.cli.out import Heartbeat, show
from mulligan.cli.run_credentials import recall_credential
from mulligan.cli.runs import whole_run_id
from mulligan.cli.watch import watch_run
from mulligan.trainer.client import RunClient
from mulligan.trainer.folder import RunState

RunId = Annotated[str, typer.Argument(help="As `mulligan runs` lists it; a unique beginning is enough.")]
AcceptEnvironment = Annotated[
    bool,
    typer.Option("--accept-environment", help="Go on although the environment is not the one that the run began in."),
]


def stop(run_id: RunId, trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"]) -> None:
    """Stop a run after the step that it is at. It can be resumed.

    Example: `mulligan stop frozenlake-1`
    """
    state, whole = run(_stop(run_id, trainer))
    again = command("resume", whole, trainer=trainer)
    if state is RunState.COMPLETED:
        show(f"run {whole} is completed: there is nothing to stop")
    elif state is RunState.RUNNING:
        show(f"stopping; go on with: {again}")
    else:
        show(f"run {whole} is {state} already; go on with: {again}")


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


async def _stop(run_id: str, trainer: str) -> tuple[RunState, str]:
    """The state before the call, and the whole id."""
    client = RunClient(endpoint(trainer))
    try:
        whole = await whole_run_id(client, run_id)
        state = (await client.get(whole)).state
        if state is RunState.RUNNING:
            recall_credential(client, trainer, whole)
            await client.stop(whole)
        return state, whole
    finally:
        await client.close()


async def _resume(run_id: str, watch: bool, accept_environment: bool, trainer: str) -> None:
    client = RunClient(endpoint(trainer))
    try:
        whole = await whole_run_id(client, run_id)
        recall_credential(client, trainer, whole)
        with Heartbeat(lambda: f"resuming run {whole}"):  # the trainer looks at the environment first
            await client.resume(whole, accept_environment=accept_environment)
    finally:
        await client.close()
    if watch:
        await watch_run(whole, trainer)
