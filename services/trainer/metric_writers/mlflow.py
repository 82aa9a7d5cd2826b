"""MLflow. Its library reads MLFLOW_TRACKING_URI, MLFLOW_TRACKING_TOKEN and the like; without an address the store is a
SQLite file in the run's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from mulligan.trainer.metric_writers import TrackedRun, require

ADDRESS = "MLFLOW_TRACKING_URI"
KEYS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
_RUN_ID = "mulligan.run_id"
_BATCH = 100  # parameters of a call; servers take no more
_VALUE_CHARACTERS = 500


def check() -> None:
    require("mlflow", "mlflow")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        require("mlflow", "sqlalchemy", "alembic")


def open(run: TrackedRun) -> MlflowWriter:
    return MlflowWriter(run)


class MlflowWriter:
    """A run of MLflow has a tag with the id of ours, by which it is found again. A metric's time is that of its event,
    so a store takes one that comes again for the same."""

    def __init__(self, run: TrackedRun):
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        os.environ.setdefault("MLFLOW_ALLOW_HTTP_REDIRECTS", "false")  # a server does not choose who gets the metrics
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            run.folder.mkdir(parents=True, exist_ok=True)
            address = f"sqlite:///{(run.folder / 'mlflow.sqlite').resolve()}"
        self._client: Any = MlflowClient(tracking_uri=address)
        experiment = self._client.get_experiment_by_name(run.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        found = self._client.search_runs([experiment_id], f"tags.`{_RUN_ID}` = '{run.run_id}'")
        if found:
            self._id: str = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        created = self._client.create_run(experiment_id, tags={_RUN_ID: run.run_id}, run_name=run.run_id)
        self._id = created.info.run_id
        params = [Param(name, str(value)[:_VALUE_CHARACTERS]) for name, value in _flat(run.settings)]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(self._id, params=params[start : start + _BATCH])

    def write(self, step: int, metrics: Mapping[str, float], time: datetime) -> None:
        from mlflow.entities import Metric

        at = int(time.timestamp() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, at, step) for name, value in metrics.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
