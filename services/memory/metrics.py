"""Prometheus counters of the memory."""

from __future__ import annotations

from prometheus_client import Counter

from mulligan.common.metrics import REGISTRY

PREFIX = "mulligan_memory"
ADDED = Counter(f"{PREFIX}_reflections_added", "Calls that added a reflection, or found it there.", registry=REGISTRY)
RETRIEVED = Counter(f"{PREFIX}_reflections_retrieved", "Reflections that queries returned.", registry=REGISTRY)
REPORTED = Counter(f"{PREFIX}_outcomes_reported", "Rewards of uses that were counted.", registry=REGISTRY)
