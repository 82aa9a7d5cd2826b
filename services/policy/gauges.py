"""Prometheus gauges of the policies, read when somebody asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mulligan.common.inference import PolicyState
from mulligan.common.metrics import REGISTRY
from mulligan.policy.deployment import Deployment
from mulligan.policy.metrics import PREFIX


def gauges(deployments: Iterable[Deployment]) -> Iterator[Metric]:
    """Of the newest deployment of each policy."""
    version = _gauge("version", "The version that serves.")
    in_flight = _gauge("in_flight", "Calls that have passed the gate and are not answered.")
    serving = _gauge("replicas_serving", "Engines that take calls.")
    replicas = _gauge("replicas", "Engines, whether they take calls or not.")
    difference = _gauge("canary_difference", "Of the last check: largest difference in log-probability.")
    state = _gauge("state", "1 for the state that the policy is in, 0 for the others.", "state")
    for deployment in deployments:
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
def collected(collector: Collector) -> Iterator[None]:
    """Its gauges are in the service's metrics while the block runs."""
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)


def _gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}_{name}", documentation, labels=["policy", *labels])
