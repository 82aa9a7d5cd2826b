"""TensorBoard's event files, in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from mulligan.trainer.metric_writers import TrackedRun, require


def check() -> None:
    require("tensorboard", "tensorboard", "torch")


def open(run: TrackedRun) -> TensorBoardWriter:
    return TensorBoardWriter(run)


class TensorBoardWriter:
    """What the files have already is not written again: TensorBoard would show it twice."""

    def __init__(self, run: TrackedRun):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        self._written: set[tuple[str, int]] = set()
        if run.folder.exists():
            found = EventAccumulator(str(run.folder), size_guidance={"scalars": 0}).Reload()
            for name in found.Tags()["scalars"]:
                self._written |= {(name, event.step) for event in found.Scalars(name)}
        self._writer: Any = SummaryWriter(str(run.folder))
        if not self._written:
            self._writer.add_text("settings", f"```json\n{json.dumps(run.settings, indent=2)}\n```")

    def write(self, step: int, metrics: Mapping[str, float], time: datetime) -> None:
        for name, value in metrics.items():
            if (name, step) not in self._written:
                self._writer.add_scalar(name, value, step, walltime=time.timestamp())
        self._writer.flush()
        self._written |= {(name, step) for name in metrics}

    def close(self) -> None:
        self._writer.close()
