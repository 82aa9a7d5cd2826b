"""What `mulligan runs` says of a run that goes on."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from mulligan.cli import runs as command
from mulligan.trainer.activity import Activity
from mulligan.trainer.client import RunInfo
from mulligan.trainer.folder import RunState
from mulligan.trainer.settings import RunSettings

NOW = datetime.now(UTC)
RUN = RunInfo("lake", RunState.RUNNING, "", RunSettings(environment="lake", steps=10), 4, NOW, 60.0, "runs/lake")
SAMPLING = Activity("sampling chains", 3, 24, 30.0)


def shown(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The run's row, by columns."""
    given: dict[str, str] = {}

    async def listed(trainer: str) -> list[RunInfo]:
        return [run]

    def table(columns: tuple[str, ...], rows: list[tuple[str, ...]], **_: object) -> None:
        (row,) = rows
        given.update(zip(columns, row, strict=True))

    monkeypatch.setattr(command, "_list", listed)
    monkeypatch.setattr(command, "table", table)
    command.runs("127.0.0.1:1")
    return given


@pytest.mark.parametrize(
    ("changes", "state", "left"),
    [
        ({}, "running", "0:01:30"),
        ({"activity": SAMPLING}, "running: sampling chains 3/24, left 0:03:30", "0:01:30"),
        (
            {"activity": Activity("learning tokens", 1500, 6000, 20.0), "beside": Activity("evaluating", 1, 2, 5.0)},
            "running: learning tokens 1,500/6,000, left 0:01:00; beside it evaluating 1/2, left 0:00:05",
            "0:01:30",
        ),
        ({"activity": Activity("learning")}, "running: learning", "0:01:30"),
        (
            {"activity": SAMPLING, "paused": "waiting for 10.0.0.7:50051: gone"},
            "paused: waiting for 10.0.0.7:50051: gone (sampling chains 3/24, left 0:03:30)",
            "0:01:30",
        ),
        ({"paused": "no room"}, "paused: no room", "0:01:30"),
        ({"step": 0, "train_seconds": 0.0}, "running", "?"),
        ({"state": RunState.FAILED, "error": "broken"}, "failed: broken", ""),
        ({"state": RunState.COMPLETED, "step": 10}, "completed", ""),
    ],
)
def test_state_and_time_left(changes: dict[str, Any], state: str, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = shown(replace(RUN, **changes), monkeypatch)
    assert (row["state"], row["left"]) == (state, left)
