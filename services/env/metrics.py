"""Prometheus metrics of the episodes. Names of environments come from the settings, so there are no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mulligan.common.metrics import REGISTRY

PREFIX = "mulligan_env"
_STARTED = Counter(f"{PREFIX}_episodes_started", "Episodes that were started.", ["environment"], registry=REGISTRY)
_ENDED = Counter(
    f"{PREFIX}_episodes_ended",
    "Episodes that ended, by outcome; unfinished: its caller ended it, or its lease did.",
    ["environment", "outcome"],
    registry=REGISTRY,
)
_STEPS = Counter(f"{PREFIX}_steps", "Steps that were played.", ["environment"], registry=REGISTRY)
UNFINISHED = "unfinished"


class EpisodeMetrics:
    """Of the episodes of one environment. Looks up labels once, not per step."""

    def __init__(self, environment: str):
        self._environment = environment
        self.started = _STARTED.labels(environment).inc
        self.stepped = _STEPS.labels(environment).inc
        self._by_outcome: dict[str, Counter] = {}

    def ended(self, outcome: str) -> None:
        counter = self._by_outcome.get(outcome)
        if counter is None:
            counter = self._by_outcome[outcome] = _ENDED.labels(self._environment, outcome)
        counter.inc()


class EpisodeGauges(Collector):
    """`live` returns how many episodes there are, `size` the bytes of their answers."""

    def __init__(self, live: Callable[[], int], size: Callable[[], int]):
        self._live = live
        self._size = size

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(f"{PREFIX}_episodes_live", "Episodes that are not over.", value=self._live())
        yield GaugeMetricFamily(
            f"{PREFIX}_answers_bytes", "Memory of the answers that are kept for repeated calls.", value=self._size()
        )
