"""What a policy counts, and what is read from its models when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mulligan.common.inference import PolicyState
from mulligan.common.metrics import REGISTRY

if TYPE_CHECKING:
    from mulligan.policy.deployment import Deployment

_PREFIX = "mulligan_policy"
SAMPLED_TOKENS = Counter(
    f"{_PREFIX}_sampled_tokens", "Tokens that were sampled and answered.", ["policy"], registry=REGISTRY
)
CANARY_FAILURES = Counter(
    f"{_PREFIX}_canary_failures", "Times that an engine failed the check of its weights.", ["policy"], registry=REGISTRY
)
UPDATE_SECONDS = Histogram(
    f"{_PREFIX}_update_seconds",
    "From the arrival of new weights until they serve.",
    ["policy"],
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
    registry=REGISTRY,
)


class PolicyCollector(Collector):
    """Gauges of the policies as they are when they are read. `deployments` yields the present model of each."""

    def __init__(self, deployments: Callable[[], Iterable[Deployment]]):
        self._deployments = deployments

    def collect(self) -> Iterator[Metric]:
        version = _gauge("version", "The version that serves.")
        in_flight = _gauge("in_flight", "Calls that have passed the gate and are not answered.")
        serving = _gauge("replicas_serving", "Engines that take calls.")
        replicas = _gauge("replicas", "Engines, whether they take calls or not.")
        difference = _gauge("canary_difference", "Of the last check: largest difference in log-probability.")
        state = _gauge("state", "1 for the state that the policy is in, 0 for the others.", "state")
        for deployment in self._deployments():
            name = deployment.name
            engines = deployment.backend.replicas
            version.add_metric([name], deployment.policy_version)
            in_flight.add_metric([name], deployment.in_flight)
            serving.add_metric([name], sum(engine.info.serving for engine in engines))
            replicas.add_metric([name], len(engines))
            if deployment.canary_difference is not None:
                difference.add_metric([name], deployment.canary_difference)
            present = deployment.state
            for each in PolicyState:
                state.add_metric([name, each], each is present)
        yield from (version, in_flight, serving, replicas, difference, state)


@contextmanager
def collected(deployments: Callable[[], Iterable[Deployment]]) -> Iterator[None]:
    """The gauges are in the service's metrics while the block runs."""
    collector = PolicyCollector(deployments)
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)


def _gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", documentation, labels=["policy", *labels])
