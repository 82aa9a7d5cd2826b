"""`mulligan learners`: the models in training that a trainer holds."""

from __future__ import annotations

from typing import Annotated

import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, endpoint, run
from mulligan.cli.ids import whole_id
from mulligan.cli.out import show, table
from mulligan.trainer.client import LearnerAdminClient
from mulligan.trainer.learner.settings import LearnerInfo

learners = typer.Typer(help="See which learners a trainer holds, and delete one that was forgotten.")


@learners.callback(invoke_without_command=True)
def list_learners(context: typer.Context, trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"]) -> None:
    """List the learners that a trainer holds, with the time since their last call.

    Example: `mulligan learners`
    """
    if context.invoked_subcommand is not None:
        return
    found = run(_list(trainer))
    if not found:
        show("no learner")
        return
    rows = []
    for info in found:
        left = "for ever" if info.lease_left is None else _time(info.lease_left)
        rows.append((info.learner_id, info.owner, info.model, str(info.optimizer_steps), _time(info.idle), left))
    columns = ("learner", "owner", "model", "optimizer steps", "idle", "lease left")
    table(columns, rows, whole=("learner", "owner"))


@learners.command()
def delete(
    learner_id: Annotated[str, typer.Argument(help="As `mulligan learners` shows it.")],
    trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """Delete a learner. What it has not saved is lost. A run that uses it goes on from its last checkpoint; `mulligan
    stop` ends a run.

    Example: `mulligan learners delete my-learner`
    """
    run(_delete(learner_id, trainer))
    show("deleted")


async def _list(address: str) -> tuple[LearnerInfo, ...]:
    client = LearnerAdminClient(endpoint(address))
    try:
        return await client.list()
    finally:
        await client.close()


async def _delete(learner_id: str, address: str) -> None:
    client = LearnerAdminClient(endpoint(address))
    try:
        held = {info.learner_id: info for info in await client.list()}
        whole = whole_id(learner_id, held, "learner")
        await client.delete(whole, held[whole].owner)
    finally:
        await client.close()


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
