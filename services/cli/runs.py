"""`mulligan runs`: lists the runs of a trainer."""

from __future__ import annotations

from mulligan.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, endpoint, run
from mulligan.cli.ids import whole_id
from mulligan.cli.out import table
from mulligan.trainer.client import RunClient, RunInfo


def runs(trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"]) -> None:
    """List the runs, newest first.

    Example: `mulligan runs --trainer 10.0.0.7:50054`
    """
    rows = []
    for info in run(_list(trainer)):
        settings = info.settings
        state = f"{info.state}: {info.error}" if info.error else str(info.state)
        now = info.activity
        if now.doing:
            state = f"{state}: {now.doing}" + (f" {now.done}/{now.total}" if now.total else "")
        state = f"paused: {info.paused}" if info.paused else state
        step = f"{info.step}/{settings.steps}"
        trained = f"{info.train_seconds:.0f} s"
        rows.append((info.run_id, state, step, settings.environment, settings.algorithm.name, trained, info.folder))
    columns = ("run", "state", "step", "environment", "algorithm", "trained", "folder")
    table(columns, rows, whole=("run", "step"))


async def _list(trainer: str) -> list[RunInfo]:
    client = RunClient(endpoint(trainer))
    try:
        return await client.runs()
    finally:
        await client.close()


async def whole_run_id(client: RunClient, run_id: str) -> str:
    """The id of the run whose id begins with `run_id`."""
    return whole_id(run_id, (info.run_id for info in await client.runs()), "run")
