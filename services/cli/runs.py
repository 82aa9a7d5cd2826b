"""`mulligan runs`: lists the runs of a trainer."""

from __future__ import annotations

from mulligan.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, endpoint, run
from mulligan.cli.ids import whole_id
from mulligan.cli.out import table
from mulligan.cli.progress import activity_text, time_left
from mulligan.trainer.client import RunClient, RunInfo
from mulligan.trainer.folder import RunState


def runs(trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"]) -> None:
    """List the runs, newest first.

    Example: `mulligan runs --trainer 10.0.0.7:50054`
    """
    rows = []
    for info in run(_list(trainer)):
        settings = info.settings
        step = f"{info.step}/{settings.steps}"
        trained = f"{info.train_seconds:.0f} s"
        algorithm = settings.algorithm.name
        rows.append(
            (info.run_id, _state(info), step, settings.environment, algorithm, trained, _left(info), info.folder)
        )
    columns = ("run", "state", "step", "environment", "algorithm", "trained", "left", "folder")
    table(columns, rows, whole=("run", "step"))


def _state(info: RunInfo) -> str:
    """With why it ended, or what it does and waits for."""
    if info.error:
        return f"{info.state}: {info.error}"
    does = activity_text(info)
    if info.paused:
        return f"paused: {info.paused}" + (f" ({does})" if does else "")
    return f"{info.state}: {does}" if does else str(info.state)


def _left(info: RunInfo) -> str:
    """Of the steps of a run that goes on, as if each took the mean of those before."""
    if info.state != RunState.RUNNING or not info.settings.steps:
        return ""
    return time_left(info.train_seconds, info.step, info.settings.steps)


async def _list(trainer: str) -> list[RunInfo]:
    client = RunClient(endpoint(trainer))
    try:
        return await client.runs()
    finally:
        await client.close()


async def whole_run_id(client: RunClient, run_id: str) -> str:
    """The id of the run whose id begins with `run_id`."""
    return whole_id(run_id, (info.run_id for info in await client.runs()), "run")
