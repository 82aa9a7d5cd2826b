"""Data are dealt out in about equal shares, and all processes run the model equally often."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.learner.batches import ERL_DEMO, recorded
from mulligan.trainer.learner.balance import balance, passes, wall
from mulligan.trainer.learner.batching import cost, packed

costs_of = st.lists(st.integers(1, 10_000), max_size=60)


def best(costs: list[int], bins: int) -> int:
    """The least cost of the costliest bin, over all divisions."""
    places = product(range(bins), repeat=len(costs))
    return min(
        max(sum(cost for cost, place in zip(costs, one, strict=True) if place == b) for b in range(bins))
        for one in places
    )


@given(costs_of, st.integers(1, 9))
def test_each_item_has_one_bin(costs: list[int], bins: int) -> None:
    found = balance(costs, bins)
    assert len(found) == bins and sorted(item for items in found for item in items) == list(range(len(costs)))
    assert all(items == sorted(items) for items in found)


@given(costs_of.filter(bool), st.integers(1, 9))
def test_no_bin_is_above_the_mean_by_more_than_an_item(costs: list[int], bins: int) -> None:
    loads = [sum(costs[item] for item in items) for items in balance(costs, bins)]
    assert bins * max(loads) <= sum(costs) + (bins - 1) * max(costs)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_the_costliest_bin_is_within_grahams_bound(costs: list[int], bins: int) -> None:
    loads = [sum(costs[item] for item in items) for items in balance(costs, bins)]
    assert max(loads) <= (4 / 3 - 1 / (3 * bins)) * best(costs, bins) + 1e-9


def test_one_long_item_takes_a_bin_of_its_own() -> None:
    assert balance([100, 30, 30, 40], 2) == [[0], [1, 2, 3]]
    assert balance([5, 5], 3) == [[0], [1], []]


@given(costs_of, st.integers(1, 5))
def test_all_processes_have_equally_many_passes(costs: list[int], size: int) -> None:
    found = [list(passes(costs, rank, size)) for rank in range(size)]
    assert len({len(one) for one in found}) == 1
    assert sorted(item for one in found for item, counts in one if counts) == list(range(len(costs)))
    assert all(costs[item] == min(costs) for one in found for item, counts in one if not counts)


@given(costs_of, st.integers(1, 5))
def test_processes_wait_for_the_costliest_of_each_pass(costs: list[int], size: int) -> None:
    runs = [[costs[item] for item, _ in passes(costs, rank, size)] for rank in range(size)]
    waits = sum(max(together) for together in zip(*runs, strict=True))
    assert wall(costs, size) == waits if size > 1 else wall(costs, 1) == sum(costs)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_step_of_erl_is_dealt_out_so_that_processes_wait_little(size: int) -> None:
    data = recorded(ERL_DEMO)
    rows = range(len(data))
    groups, costs = packed(data, rows, 16_384, size, sharing=True)
    assert sorted(row for group in groups for row in group) == list(rows)
    assert costs == [cost(data, group, sharing=True) for group in groups]
    alone = cost(data, rows, sharing=True)
    assert wall(costs, size) <= alone / size * {2: 1.2, 4: 1.2, 8: 1.7}[size]


def test_one_process_keeps_the_order_and_several_begin_with_the_costliest() -> None:
    assert list(passes([1, 3, 2], 0, 1)) == [(0, True), (1, True), (2, True)]
    assert list(passes([1, 9, 2, 5], 0, 2)) == [(1, True), (0, False), (0, False)]
    assert list(passes([1, 9, 2, 5], 1, 2)) == [(3, True), (2, True), (0, True)]
