"""What the benchmarks share: alternating rounds, medians, a table for people and one JSON object for programs."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import random
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TypeVar

M = TypeVar("M")
WORDS = 60_000  # of the language


class Language:
    """Draws words with Zipf's law."""

    def __init__(self) -> None:
        rng = random.Random("vocabulary")
        self._words = ["".join(rng.choices("bdfgklmnprstvz", k=3)) + rng.choice("aeiou") + str(n) for n in range(WORDS)]
        self._weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(WORDS)))

    def draw(self, rng: random.Random, count: int) -> str:
        return " ".join(rng.choices(self._words, cum_weights=self._weights, k=count))


async def alternate(measures: Mapping[str, Callable[[], Awaitable[M]]], rounds: int) -> dict[str, list[M]]:
    """Runs the measures in turn, `rounds` times. So a slow phase of the machine affects all of them."""
    found: dict[str, list[M]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(await measure())
    return found


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def spread(values: Sequence[float]) -> str:
    """The smallest and the largest value, as text."""
    return f"{min(values):,.0f}–{max(values):,.0f}"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_result(name: str, values: Mapping[str, object]) -> None:
    """Prints the last line of a benchmark: one JSON object."""
    machine = {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "grpcio": version("grpcio"),
    }
    print(json.dumps({"benchmark": name, "machine": machine, **values}))
