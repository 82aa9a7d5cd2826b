"""REINFORCE++: against whitening over a batch of tokens, the formula of verl's `compute_reinforce_plus_plus_*`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch.nn.utils.rnn import pad_sequence

from mulligan.trainer.advantages import Return
from mulligan.trainer.advantages.reinforce_plus_plus import Settings, estimate
from tests.support.returns import flat, group, groups, per_token, sample


def reference(batch: list[list[Return]], baseline: bool) -> list[float]:
    """The reward at the last token; returns from each token on; whitened over all tokens that are no padding."""
    items = [item for group in batch for item in group]
    mask = pad_sequence([torch.ones(item.tokens, dtype=torch.bool) for item in items], batch_first=True)
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    row = 0
    for members in batch:
        mean = sum(item.reward for item in members) / len(members) if baseline else 0.0
        for item in members:
            rewards[row, item.tokens - 1] = item.reward - mean
            row += 1
    from_each_token_on = rewards.flip(1).cumsum(1).flip(1)
    tokens = from_each_token_on[mask]
    return ((tokens - tokens.mean()) * torch.rsqrt(tokens.var() + 1e-8)).tolist()


@given(groups(min_size=2))
@pytest.mark.parametrize("baseline", [True, False])
def test_advantages_are_those_of_the_formula(baseline: bool, batch: list[list[Return]]) -> None:
    found = per_token(batch, estimate(batch, Settings(baseline=baseline)))
    tokens = [number for items in found for item in items for number in item]
    assert tokens == pytest.approx(reference(batch, baseline), rel=1e-6, abs=1e-6)


def test_without_baseline_groups_do_not_matter() -> None:
    together, apart = [group(1.0, 0.0, 3.0)], [group(1.0), group(0.0), group(3.0)]
    assert flat(estimate(together, Settings())) == flat(estimate(apart, Settings()))
    assert estimate(apart, Settings(baseline=True)) == [[0.0], [0.0], [0.0]]


def test_batches_that_say_nothing_have_no_advantage() -> None:
    for settings in (Settings(), Settings(baseline=True)):
        assert estimate([[], group(0.1, 0.1, 0.1), group(0.1)], settings) == [[], [0.0, 0.0, 0.0], [0.0]]
        assert estimate([[sample(1.0, tokens=1)]], settings) == [[0.0]]
        assert estimate([[sample(1.0, tokens=0), sample(0.0, tokens=0)]], settings) == [[0.0, 0.0]]
        assert estimate([], settings) == []


def test_a_long_sample_counts_as_often_as_it_has_tokens() -> None:
    """Rewards 1 and 0, with one and three tokens: mean 1/4, variance 1/4."""
    found = estimate([[sample(1.0, tokens=1), sample(0.0, tokens=3)]], Settings())
    assert flat(found) == pytest.approx([1.5, -0.5], abs=1e-6)


def test_rounding_alone_is_no_difference() -> None:
    """0.1 + 0.1 + 0.1 is not 3 · 0.1 in binary fractions, and a whitened rounding error would still move weights."""
    for settings in (Settings(), Settings(baseline=True)):
        assert estimate([[sample(0.1, tokens=count) for count in (1, 2, 3)]], settings) == [[0.0, 0.0, 0.0]]
    batch = [[sample(0.1, tokens=3), sample(0.7, tokens=0)]]
    assert estimate(batch, Settings()) == [[0.0, 0.0]], "the only tokens are of one sample"
