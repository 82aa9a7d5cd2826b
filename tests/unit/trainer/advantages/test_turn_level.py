"""GAE over turns and within them: against explicit sums over a sequence of tokens.

The formulas are those of RAGEN's `compute_bi_level_gae_advantage_return`, at a value of each token that is the group's
mean return of its turn.
"""

from __future__ import annotations

from math import fsum

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mulligan.trainer.advantages import Return
from mulligan.trainer.advantages.turn_level import Settings, estimate
from tests.support.returns import flat, groups, per_token

FACTOR = st.sampled_from([0.0, 0.5, 0.95, 1.0])
SETTINGS = st.builds(
    Settings, turn_discount=FACTOR, turn_lambda=FACTOR, token_discount=FACTOR, token_lambda=FACTOR, whiten=st.booleans()
)


def gae(rewards: torch.Tensor, values: torch.Tensor, discount: float, decay: float) -> torch.Tensor:
    """Σ_l (γλ)^l δ_{t+l} as one product with a triangular matrix (arXiv 1506.02438, eq. 16)."""
    size = len(rewards)
    deltas = rewards + discount * torch.cat([values[1:], torch.zeros(1, dtype=torch.float64)]) - values
    distance = torch.arange(size)[None, :] - torch.arange(size)[:, None]
    powers = torch.where(distance >= 0, (discount * decay) ** distance.clamp(min=0).double(), 0.0)
    return powers @ deltas


def mean_returns(items: list[Return], discount: float) -> torch.Tensor:
    most = max(len(item.turn_rewards) for item in items)
    means = []
    for turn in range(most):
        later = [item.turn_rewards[turn:] for item in items if len(item.turn_rewards) > turn]
        means.append(fsum(fsum(discount**k * reward for k, reward in enumerate(rest)) for rest in later) / len(later))
    return torch.tensor(means, dtype=torch.float64)


def reference(batch: list[list[Return]], settings: Settings) -> list[float]:
    tokens = []
    for items in batch:
        values = mean_returns(items, settings.turn_discount)
        for item in items:
            own = values[: len(item.turn_rewards)]
            rewards = torch.tensor(item.turn_rewards, dtype=torch.float64)
            of_turns = gae(rewards, own, settings.turn_discount, settings.turn_lambda) + own
            for total, value, size in zip(of_turns, own, item.turn_tokens, strict=True):
                at_the_end = torch.zeros(size, dtype=torch.float64)
                at_the_end[-1] = total
                within = gae(at_the_end, value.expand(size), settings.token_discount, settings.token_lambda)
                tokens.append(within)
    whole = torch.cat(tokens)
    if settings.whiten and len(whole) > 1:
        whole = (whole - whole.mean()) * torch.rsqrt(whole.var() + 1e-8)
    return whole.tolist()


@given(groups().filter(lambda batch: sum(item.tokens for items in batch for item in items) > 1), SETTINGS)
def test_advantages_are_those_of_the_formula(batch: list[list[Return]], settings: Settings) -> None:
    assert flat(estimate(batch, settings)) == pytest.approx(reference(batch, settings), rel=1e-6, abs=1e-6)


def test_the_turn_that_decided_gets_the_credit() -> None:
    """Both end with 1 of 2 rewards: one scores in its first turn, the other in its second."""
    early, late = Return(1.0, (1.0, 0.0), (2, 1)), Return(1.0, (0.0, 1.0), (1, 2))
    found = estimate([[early, late]], Settings(whiten=False))
    assert found == [[(0.0, 0.0, -0.5), (0.0, 0.5, 0.5)]]
    assert estimate([[early, late]], Settings(whiten=False, turn_lambda=0.0)) == [[(0.5, 0.5, -0.5), (-0.5, 0.5, 0.5)]]


def test_samples_of_different_length_share_a_value_where_both_have_a_turn() -> None:
    short, long = Return(1.0, (1.0,), (1,)), Return(2.0, (0.0, 2.0), (1, 1))
    assert estimate([[short, long]], Settings(whiten=False)) == [[(-0.5,), (0.5, 0.0)]]


def test_what_says_nothing_has_no_advantage() -> None:
    alone, equal = Return(1.0, (0.25, 0.75), (2, 1)), Return(0.3, (0.1, 0.2), (1, 2))
    for whiten in (True, False):
        batch = [[], [alone], [equal, equal, equal]]
        found = per_token(batch, estimate(batch, Settings(whiten=whiten)))
        assert [[len(tokens) for tokens in items] for items in found] == [[], [3], [3, 3, 3]]
        numbers = [number for items in found for tokens in items for number in tokens]
        assert numbers == [0.0] * 12, "also not rounding errors, which would move weights"
    assert estimate([], Settings()) == []


def test_turns_without_tokens_carry_rewards() -> None:
    """A turn in which nothing was sampled, and a sample without turns."""
    silent, spoken = Return(1.0, (0.0, 1.0), (2, 0)), Return(0.0, (0.0, 0.0), (1, 1))
    found = estimate([[silent, spoken, Return(0.0, (), ())]], Settings(whiten=False))
    assert found == [[(0.5, 0.5), (-0.5, -0.5), ()]]
