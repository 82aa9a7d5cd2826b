"""Prometheus gauges of the policies, read when somebody asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from mulligan.common.inference import PolicyState
from mulligan.common.metrics import OTHER
from mulligan.policy.deployment import Deployment
from mulligan.policy.metrics import PREFIX


def gauges(deployments: Iterable[Deployment]) -> Iterator[Metric]:
    """Of the newest deployment of each policy whose name is a label."""
    version = _gauge("version", "The version that serves.")
    in_flight = _gauge("calls_in_flight", "Calls that have passed the gate and are not answered.")
    serving = _gauge("replicas_serving", "Engines that take calls.")
    replicas = _gauge("replicas", "Engines, whether they take calls or not.")
    difference = _gauge("canary_difference", "Of the last check: largest difference in log-probability.")
    state = _gauge("state", "1 for the state that the policy is in, 0 for the others.", "state")
    for deployment in deployments:
        name = deployment.label
        if name == OTHER:  # of several, perhaps: they have no values in common
            continue
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


def _gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}_{name}", documentation, labels=["policy", *labels])
