"""Names that an algorithm or protocol gives to what it has sampled. They stand in ids and in names of metrics."""

from __future__ import annotations

import re

from mulligan.common.suggest import did_you_mean

SPEAKERS = ("reflector", "judge")  # of `policies`, for texts
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def check_role(role: str, what: str = "role") -> None:
    """Raises ValueError. In an id a number may follow, after a hyphen, so no role has a hyphen."""
    if not _ROLE.fullmatch(role):
        expected = "expected 1 to 64 letters, digits and '_', the first a letter"
        raise ValueError(f"{what}: {expected}; got {role[:100]!r}")


def check_speaker(speaker: str) -> None:
    """Raises ValueError."""
    if speaker not in SPEAKERS:
        near = did_you_mean(speaker, SPEAKERS)
        raise ValueError(f"speaker: expected {' or '.join(map(repr, SPEAKERS))}; got {speaker!r}{near}")
