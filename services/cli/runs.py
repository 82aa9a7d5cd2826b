"""`mulligan runs`: what has been trained."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from services.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, endpoint, run
from services.trainer.client import RunClient, RunInfo


def runs(trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"]) -> None:
    """List the runs, newest first.

    Example: `mulligan runs --trainer 10.0.0.7:50054`
    """
    table = Table("run", "state", "step", "environment", "second attempt", "trained", "folder", box=None)
    for info in run(_list(trainer)):
        settings = info.settings
        state = f"{info.state}: {info.error}" if info.error else str(info.state)
        state = f"paused: {info.paused}" if info.paused else state
        step = f"{info.step}/{settings.steps}"
        second = str(settings.algorithm.second_attempt)
        table.add_row(
            info.run_id, state, step, settings.environment, second, f"{info.train_seconds:.0f} s", info.folder
        )
    Console().print(table)


async def _list(trainer: str) -> list[RunInfo]:
    client = RunClient(endpoint(trainer))
    try:
        return await client.runs()
    finally:
        await client.close()
