"""What several estimators compute: means, deviations, whitening."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt

EPSILON = 1e-6  # added to standard deviations; verl's, on which the reference code of ERL is built
_VARIANCE_EPSILON = 1e-8  # added to variances by `masked_whiten` of TRL and verl


def centred(values: Sequence[float]) -> list[float]:
    """value - mean; exactly 0 for a single value or equal ones."""
    if len(set(values)) < 2:
        return [0.0] * len(values)
    mean = fsum(values) / len(values)
    return [value - mean for value in values]


def deviation(values: Sequence[float]) -> float:
    """The standard deviation, which divides by n - 1 as in TRL and verl; 0 for a single value or equal ones."""
    if len(set(values)) < 2:
        return 0.0
    return sqrt(fsum(value**2 for value in centred(values)) / (len(values) - 1))


def whitened(values: Sequence[float], counts: Sequence[int]) -> list[float]:
    """(value - mean) / √(variance + 1e-8), where value i occurs `counts[i]` times; the variance divides by n - 1.

    0 everywhere if there are fewer than two occurrences or nothing differs. `masked_whiten` of TRL and verl, whose mask
    is over tokens.
    """
    total = sum(counts)
    if total < 2:
        return [0.0] * len(values)
    mean = fsum(value * count for value, count in zip(values, counts, strict=True)) / total
    variance = fsum((value - mean) ** 2 * count for value, count in zip(values, counts, strict=True)) / (total - 1)
    if variance == 0:
        return [0.0] * len(values)
    return [(value - mean) / sqrt(variance + _VARIANCE_EPSILON) for value in values]
