"""Prometheus metrics of runs. A trainer trains one run at a time, and the gauges are that run's.

No label has the id of a run: callers choose them, and each would make series that stay. Logs and traces name runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mulligan.common.metrics import REGISTRY, BoundedNames
from mulligan.trainer.events import EvaluationEvent, StepEvent

PREFIX = "mulligan_trainer"
_STEPS = Counter(f"{PREFIX}_steps", "Steps of runs that ended.", registry=REGISTRY)
_STEP_SECONDS = Histogram(
    f"{PREFIX}_step_duration_seconds",
    "Whole steps of runs.",
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000),
    registry=REGISTRY,
)
_PHASE_SECONDS = Counter(
    f"{PREFIX}_phase_seconds",
    "Time of steps by what it was spent on; waiting_for_rollouts: the learner had nothing to learn from; "
    "waiting_for_learner: sampling stood still.",
    ["phase"],
    registry=REGISTRY,
)
_COUNTS = {  # by their names among the metrics of a step
    "rollouts": Counter(f"{PREFIX}_rollouts", "Episodes started and texts written.", registry=REGISTRY),
    "sampled_tokens": Counter(f"{PREFIX}_sampled_tokens", "Tokens that were sampled in steps.", registry=REGISTRY),
    "excluded": Counter(
        f"{PREFIX}_excluded", "Rollouts without an outcome, for a failure of the infrastructure.", registry=REGISTRY
    ),
    "dropped": Counter(f"{PREFIX}_dropped", "Samples that could not be trained on.", registry=REGISTRY),
    "not_finite": Counter(
        f"{PREFIX}_not_finite", "Optimizer steps skipped as gradient or loss were not finite.", registry=REGISTRY
    ),
}
_RUNS_ENDED = Counter(f"{PREFIX}_runs_ended", "Runs that ended, by state.", ["state"], registry=REGISTRY)
for _state in ("completed", "stopped", "failed"):
    _RUNS_ENDED.labels(_state)
_PHASES = ("sample", "learn", "waiting_for_rollouts", "waiting_for_learner")
_ROLES = BoundedNames(20)  # algorithms choose them
_SUCCESS = "success_"


class ActiveRun(Protocol):
    """What is shown of a run."""

    step: int

    @property
    def paused(self) -> str: ...

    @property
    def last_step(self) -> int: ...

    @property
    def newest(self) -> tuple[StepEvent | None, EvaluationEvent | None]: ...


def step_ended(metrics: Mapping[str, float]) -> None:
    """`metrics` are those of the step's event."""
    _STEPS.inc()
    _STEP_SECONDS.observe(metrics["seconds"])
    for phase in _PHASES:
        _PHASE_SECONDS.labels(phase).inc(metrics.get(f"{phase}_seconds", 0.0))
    for name, counter in _COUNTS.items():
        counter.inc(metrics.get(name, 0.0))


def run_ended(state: str) -> None:
    _RUNS_ENDED.labels(state).inc()


class RunGauges(Collector):
    """`active` returns the run that trains, if one does."""

    def __init__(self, active: Callable[[], ActiveRun | None]):
        self._active = active

    def collect(self) -> Iterator[Metric]:
        run = self._active()
        yield _gauge("run_active", "1 while a run trains, else 0; then there are no other run gauges.", bool(run))
        success = _gauge("run_success_ratio", "Of the last step: attempts that succeeded, by their role.", role=True)
        if run is not None:
            yield _gauge("run_step", "Steps of the run that are trained.", run.step)
            yield _gauge("run_steps", "Steps that the run is to have.", run.last_step)
            yield _gauge("run_paused", "1 while the run waits for room on a disk, or for a service.", bool(run.paused))
            step, evaluation = run.newest
            for name, value in (step.metrics if step is not None else {}).items():
                if name.startswith(_SUCCESS):
                    success.add_metric([_ROLES.label(name.removeprefix(_SUCCESS))], value)
            if evaluation is not None:
                text = "Of the run's last evaluation: attempts that succeeded."
                yield _gauge("run_evaluation_success_ratio", text, evaluation.success)
        yield success


def _gauge(name: str, documentation: str, value: float | None = None, *, role: bool = False) -> GaugeMetricFamily:
    labels = ["role"] if role else None
    return GaugeMetricFamily(f"{PREFIX}_{name}", documentation, value=value, labels=labels)
