"""Negative-aware fine-tuning against the paper's equations, and its gradient at the old policy."""

from __future__ import annotations

import math

import pytest
import torch

from mulligan.trainer.losses import ppo
from mulligan.trainer.objectives.negative_aware import NegativeAware, loss
from tests.support.terms import floats, gradient, ragged, terms


def nft(ratio: float, is_right: bool, rate: float) -> tuple[float, float]:
    """Loss of one token and its derivative by log π, by hand (arXiv 2505.18116): weight 1 − q, and a bound of 1 on the
    negative ratio, whose gradient passes through."""
    if is_right:
        return -(1 - rate) * math.log(ratio), -(1 - rate)
    bounded = max((1 - rate * ratio) / (1 - rate), 1.0)
    return -(1 - rate) * math.log(bounded), rate * ratio / bounded


@pytest.mark.parametrize("seed", range(3))
def test_it_is_that_of_the_paper(seed: int) -> None:
    counts = ragged(seed)
    new = floats(sum(counts), -4, 0, seed).requires_grad_()
    old = new.detach() + floats(sum(counts), -2, 2, seed + 1)
    rates = floats(len(counts), 0.1, 0.9, seed + 2)
    right = torch.tensor([float(place % 2) for place in range(len(counts))], dtype=torch.float64)
    found = loss(
        terms(counts, new, numbers={"right": right, "success_rate": rates}, token_values={"old_log_probs": old}),
        ppo.Settings(),
    )
    places = [row for row, count in enumerate(counts) for _ in range(count)]
    expected = [
        nft(ratio, bool(right[row]), rates[row].item())
        for ratio, row in zip((new - old).exp().tolist(), places, strict=True)
    ]
    assert found.loss_N.tolist() == pytest.approx([value for value, _ in expected], abs=1e-6)
    [derivatives] = gradient(found.loss_N, new)
    assert derivatives.tolist() == pytest.approx([derivative for _, derivative in expected], abs=1e-6)


def test_at_the_old_policy_it_is_a_policy_gradient_with_advantage_right_minus_rate() -> None:
    log_probs = torch.tensor([-1.0, -0.5, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    rates = torch.tensor([0.25, 0.75, 1.0, 0.0], dtype=torch.float64)
    right = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    found = loss(
        terms(
            [1] * 4, log_probs, numbers={"right": right, "success_rate": rates}, token_values={"old_log_probs": None}
        ),
        ppo.Settings(),
    )
    advantages = [0.75, -0.75, 0.02, -0.02]  # the rate is kept within 0.02 and 0.98
    assert gradient(found.loss_N, log_probs)[0].tolist() == pytest.approx([-one for one in advantages])


@pytest.mark.parametrize("log_ratio", [5.0, 15.0, 100.0])
def test_a_wrong_token_that_became_much_likelier_has_a_finite_loss(log_ratio: float) -> None:
    """In float32, in which models are trained."""
    log_probs = torch.tensor([log_ratio], requires_grad=True)
    numbers = {"right": torch.tensor([0.0]), "success_rate": torch.tensor([0.98])}
    found = loss(terms([1], log_probs, numbers=numbers, token_values={"old_log_probs": torch.zeros(1)}), ppo.Settings())
    assert found.loss_N.item() == 0.0, "the negative policy's ratio is bounded at 1"
    (derivative,) = gradient(found.loss_N, log_probs)
    expected = 0.98 * math.exp(log_ratio) if log_ratio < 20 else 0.0  # beyond, the ratio is cut
    assert derivative.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("right", "rate", "field"), [(0.5, 0.5, "right"), (1.0, 1.5, "success_rate")])
def test_numbers_of_no_use_are_refused(right: float, rate: float, field: str) -> None:
    unusable = NegativeAware(right, rate).unusable((3,))
    assert unusable is not None and unusable.field == field
