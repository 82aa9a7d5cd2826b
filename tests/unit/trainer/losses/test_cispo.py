"""CISPO against TRL's formulas."""

from __future__ import annotations

import pytest
import torch

from mulligan.trainer.losses.cispo import Settings, loss
from tests.support.terms import floats, gradient, ragged, terms


@pytest.mark.parametrize("seed", range(3))
def test_it_is_that_of_trl(seed: int) -> None:
    """trl.GRPOTrainer._compute_loss with loss_type="cispo", where epsilon_high bounds the ratio itself."""
    counts = ragged(seed)
    new = floats(sum(counts), -4, 0, seed).requires_grad_()
    old = new.detach() + floats(sum(counts), -3, 3, seed + 1)
    advantages = floats(sum(counts), -2, 2, seed + 2)
    coef_1 = torch.exp(new - old)
    clamped_ratios = torch.clamp(coef_1, max=5.0).detach()
    expected = -clamped_ratios * advantages * new
    found = loss(terms(counts, new), old, advantages, Settings())
    assert torch.allclose(found.loss_N, expected, atol=1e-6)
    assert torch.allclose(gradient(found.loss_N, new)[0], gradient(expected, new)[0], atol=1e-6)
    assert found.metrics["clip_fraction"].tolist() == (coef_1 > 5.0).tolist()
    assert found.metrics["clip_fraction"].any() and not found.metrics["clip_fraction"].all()


def test_a_clipped_token_keeps_a_gradient() -> None:
    log_probs = torch.tensor([0.0, -1.0], requires_grad=True)
    old = torch.tensor([-3.0, -0.5])
    found = loss(terms([2], log_probs), old, torch.tensor([1.0, -1.0]), Settings(clip_low=0.2, clip_high=0.5))
    assert gradient(found.loss_N, log_probs)[0].tolist() == pytest.approx([-1.5, 0.8])
