"""Weights & Biases. WANDB_API_KEY, WANDB_BASE_URL, WANDB_ENTITY and WANDB_MODE are read by its library; with
WANDB_MODE=offline it writes files in the run's folder, for `wandb sync`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from mulligan.trainer.metric_writers import TrackedRun, require

ADDRESS = "WANDB_BASE_URL"
KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def check() -> None:
    require("wandb", "wandb")


def open(run: TrackedRun) -> WandbWriter:
    return WandbWriter(run)


class WandbWriter:
    """The step is a metric of its own, so that evaluations beside training may come after later steps."""

    def __init__(self, run: TrackedRun):
        import wandb

        online = os.environ.get("WANDB_MODE", "online") in ("online", "shared")
        if online and not any(map(os.environ.get, ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))):  # it would ask
            raise ValueError("expected WANDB_API_KEY, or WANDB_MODE=offline, in the trainer's environment")
        run.folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=run.project,
            id=run.run_id,
            name=run.run_id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float], time: datetime) -> None:
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        self._run.finish()
