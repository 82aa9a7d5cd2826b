"""Deals data out to the processes of a learner, so that each has about as many tokens."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import zip_longest


def balance(costs: Sequence[int], bins: int) -> list[list[int]]:
    """Deals items out to `bins` bins. Returns the items of each bin, in ascending order.

    Longest processing time first: the costliest item goes to the bin with the least cost so far. The costliest bin has
    at most 4/3 - 1/(3 × bins) times the cost that the best division has (R. L. Graham, "Bounds on multiprocessing
    timing anomalies", SIAM Journal on Applied Mathematics 17, 1969). Equal inputs give equal divisions.
    """
    found: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, index) for index in range(bins)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        cost, index = heap[0]
        found[index].append(item)
        heapq.heapreplace(heap, (cost + costs[item], index))
    return [sorted(items) for items in found]


def wall(costs: Sequence[int], size: int) -> int:
    """The tokens that `size` processes wait for: of each pass, those of the costliest micro-batch."""
    shares = [sorted((costs[item] for item in share), reverse=True) for share in balance(costs, size)]
    return sum(max(together) for together in zip_longest(*shares, fillvalue=0))


def passes(costs: Sequence[int], rank: int, size: int) -> Iterator[tuple[int, bool]]:
    """The micro-batches that process `rank` of `size` runs, each with whether it counts; `costs` are those of all.

    All processes must run the model equally often, and wait for each other in each pass. So the costliest come first,
    and a process that has fewer than another repeats the cheapest, in passes that do not count.
    """
    if size == 1:
        yield from ((item, True) for item in range(len(costs)))
        return
    shares = balance(costs, size)
    yield from ((item, True) for item in sorted(shares[rank], key=lambda item: (-costs[item], item)))
    for _ in range(max(map(len, shares)) - len(shares[rank])):
        yield min(range(len(costs)), key=lambda item: costs[item]), False
