"""Aggregations of token losses: what holds for all of them; `tests/reference/test_trl.py` compares them with TRL."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mulligan.trainer.aggregation import Aggregation, aggregate
from mulligan.trainer.data import Datum, PolicyGradient

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def datum(number: int, tokens: int, weight: float) -> Datum:
    """One prompt token and `tokens` trained ones."""
    mask = (False, *[True] * tokens)
    return Datum(str(number), (1,) * len(mask), mask, weight, 1.0, PolicyGradient(1.0, (-0.5,) * tokens), "first")


def branch(lengths: list[int], weights: list[float]) -> list[Datum]:
    return [datum(number, *pair) for number, pair in enumerate(zip(lengths, weights, strict=True))]


def loss(data: list[Datum], losses: list[torch.Tensor]) -> float:
    """What a learner computes."""
    return sum(item.weight * float(tokens.sum()) for item, tokens in zip(data, losses, strict=True))


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.01, 10)), min_size=1, max_size=8))
@pytest.mark.parametrize("mode", [Aggregation.SEQUENCE_MEAN_TOKEN_MEAN, Aggregation.TOKEN_MEAN])
def test_a_mean_of_ones_is_the_weight_of_the_branch(mode: Aggregation, pairs: list[tuple[int, float]]) -> None:
    """Whatever the weights of its data."""
    lengths, weights = [length for length, _ in pairs], [weight for _, weight in pairs]
    data = aggregate(branch(lengths, weights), mode)
    assert loss(data, [torch.ones(size) for size in lengths]) == pytest.approx(sum(weights))


def test_the_sum_over_tokens_changes_nothing() -> None:
    data = branch([3, 1], [0.5, 0.5])
    assert all(
        new is old for new, old in zip(aggregate(data, Aggregation("sequence_mean_token_sum")), data, strict=True)
    )


@pytest.mark.parametrize("mode", list(Aggregation))
def test_nothing_and_nothing_trained(mode: Aggregation) -> None:
    assert aggregate([], mode) == []
    assert aggregate(branch([0], [0.25]), mode) == branch([0], [0.25])
    assert aggregate(branch([2, 4], [0.0, 0.0]), mode) == branch([2, 4], [0.0, 0.0])


@pytest.mark.parametrize("constant", [0.0, -1.0, math.nan, math.inf])
def test_a_constant_that_is_none_is_refused(constant: float) -> None:
    with pytest.raises(ValueError, match="constant: expected a finite number above 0"):
        aggregate(branch([1], [1.0]), Aggregation.CONSTANT, constant)
