"""Histograms of rewards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class Bin:
    """Of a histogram: rewards from `low` to `high`, both included."""

    low: float
    high: float
    count: int


def histogram(rewards: ArrayLike, bins: int = 20) -> list[Bin]:
    """As many bins as there are different rewards, if those are few."""
    values, counts = np.unique(np.asarray(rewards, np.float64), return_counts=True)
    if len(values) <= bins:
        return [Bin(value, value, count) for value, count in zip(values.tolist(), counts.tolist(), strict=True)]
    low, high = float(values[0]), float(values[-1])
    width = (high - low) / bins
    places = np.minimum(((values - low) / width).astype(np.int64), bins - 1)
    sums = np.bincount(places, counts, bins)
    return [Bin(low + width * place, low + width * (place + 1), int(sums[place])) for place in range(bins)]
