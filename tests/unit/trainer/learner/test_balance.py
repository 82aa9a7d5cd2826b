"""Data are dealt out in about equal shares, and all processes run the model equally often."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from mulligan.trainer.learner.balance import balance, passes

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


def test_one_process_keeps_the_order_and_several_begin_with_the_costliest() -> None:
    assert list(passes([1, 3, 2], 0, 1)) == [(0, True), (1, True), (2, True)]
    assert list(passes([1, 9, 2, 5], 0, 2)) == [(1, True), (0, False), (0, False)]
    assert list(passes([1, 9, 2, 5], 1, 2)) == [(3, True), (2, True), (0, True)]
