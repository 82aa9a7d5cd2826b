"""Versions of a policy, as its store keeps them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from mulligan.common.inference import CanaryProbe, PolicyVersion, VersionState, WeightsKind
from mulligan.policy.backend import WeightsFile
from mulligan.policy.version_table import VersionRecord
from mulligan.policy.versions import VersionStore

PROBES = (CanaryProbe((1, 2, 3), (-0.5, -1.25)),)


def record_of(number: int, origin: int, content: bytes | None, **changes: object) -> VersionRecord:
    version = PolicyVersion(
        policy_version=number,
        kind=WeightsKind.ORIGINAL if content is None else WeightsKind.FULL,
        state=VersionState.SERVING,
        sha256="" if content is None else hashlib.sha256(content).hexdigest(),
        fingerprint="f",
        created_at=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        model="m",
    )
    return replace(VersionRecord(version, origin, "transformers:m", "s", () if content is None else PROBES), **changes)  # type: ignore[arg-type]


def staged(store: VersionStore, folder: Path, number: int, content: bytes) -> WeightsFile:
    path = folder / f"{number}.published"
    path.write_bytes(content)
    weights = WeightsFile(path, WeightsKind.FULL, number, hashlib.sha256(content).hexdigest(), PROBES)
    return store.stage(weights)
