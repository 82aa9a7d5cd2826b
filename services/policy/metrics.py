"""Prometheus counters of the policies. Their gauges are in `gauges.py`."""

from __future__ import annotations

from contextlib import suppress

from prometheus_client import Counter, Histogram

from mulligan.common.metrics import OTHER, REGISTRY, BoundedNames

PREFIX = "mulligan_policy"
NAMES = BoundedNames()
SAMPLED_TOKENS = Counter(
    f"{PREFIX}_sampled_tokens", "Tokens that were sampled and answered.", ["policy"], registry=REGISTRY
)
CANARY_FAILURES = Counter(
    f"{PREFIX}_canary_failures", "Times that an engine failed the check of its weights.", ["policy"], registry=REGISTRY
)
UPDATE_SECONDS = Histogram(
    f"{PREFIX}_update_duration_seconds",
    "From the arrival of new weights until they serve.",
    ["policy"],
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
    registry=REGISTRY,
)


def begin(policy: str) -> None:
    """Its series are there from the start, with nothing counted."""
    for metric in (SAMPLED_TOKENS, CANARY_FAILURES, UPDATE_SECONDS):
        metric.labels(NAMES.label(policy))


def forget(policy: str) -> None:
    """A policy is gone, and with it its series. Its name stays one of those that are labels."""
    if (label := NAMES.label(policy)) == OTHER:
        return
    for metric in (SAMPLED_TOKENS, CANARY_FAILURES, UPDATE_SECONDS):
        with suppress(KeyError):
            metric.remove(label)
