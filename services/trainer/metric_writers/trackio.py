"""trackio. Its library reads TRACKIO_DIR, its folder, where `trackio show` finds the runs, and TRACKIO_SPACE_ID."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from mulligan.trainer.metric_writers import TrackedRun, require


def check() -> None:
    require("trackio", "trackio")


def open(run: TrackedRun) -> TrackioWriter:
    return TrackioWriter(run)


class TrackioWriter:
    def __init__(self, run: TrackedRun):
        import trackio

        self._run: Any = trackio.init(
            project=run.project,
            name=run.run_id,
            resume="allow",
            config=dict(run.settings),
            embed=False,
            auto_log_gpu=False,
        )

    def write(self, step: int, metrics: Mapping[str, float], time: datetime) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
