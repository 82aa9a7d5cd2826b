"""What several estimators compute: means, deviations, whitening."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt

EPSILON = 1e-6  # added to standard deviations; verl's, on which the reference code of ERL is built
_VARIANCE_EPSILON = 1e-8  # added to variances, as by verl's `masked_whiten`


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value; of equal ones, exactly the value."""
    return values[0] if len(set(values)) == 1 else fsum(values) / len(values)


def centred(values: Sequence[float]) -> list[float]:
    """value - mean; exactly 0 for a single value or equal ones."""
    if not values:
        return []
    middle = mean(values)
    return [value - middle for value in values]


def deviation(values: Sequence[float]) -> float:
    """The standard deviation, which divides by n - 1 as in TRL and verl; 0 for a single value or equal ones."""
    if len(set(values)) < 2:
        return 0.0
    return sqrt(fsum(value**2 for value in centred(values)) / (len(values) - 1))


def whitened(values: Sequence[float], counts: Sequence[int]) -> list[float]:
    """(value - mean) / √(variance + 1e-8), where value i occurs `counts[i]` times; the variance divides by n - 1.

    Exactly 0 everywhere if nothing that occurs differs. The formula of verl's `masked_whiten`, whose mask is over
    tokens.
    """
    total = sum(counts)
    if len({value for value, count in zip(values, counts, strict=True) if count}) < 2:
        return [0.0] * len(values)
    middle = fsum(value * count for value, count in zip(values, counts, strict=True)) / total
    variance = fsum((value - middle) ** 2 * count for value, count in zip(values, counts, strict=True)) / (total - 1)
    return [(value - middle) / sqrt(variance + _VARIANCE_EPSILON) for value in values]
