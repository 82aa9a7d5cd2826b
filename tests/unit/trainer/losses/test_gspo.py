"""GSPO against TRL's formulas, on sequences of different lengths."""

from __future__ import annotations

import pytest
import torch

from mulligan.trainer.losses.gspo import Settings, loss
from tests.support.terms import floats, gradient, ragged, terms


def trl(
    log_probs: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """trl.GRPOTrainer._compute_loss with importance_sampling_level="sequence", for one sequence: the sum of the loss
    over its tokens, and whether they were clipped."""
    log_importance_weights = (log_probs - old).sum(-1) / len(log_probs)
    coef_1 = torch.exp(log_importance_weights)
    coef_2 = torch.clamp(coef_1, 1 - settings.clip_low, 1 + settings.clip_high)
    loss1 = coef_1 * advantage
    loss2 = coef_2 * advantage
    return -torch.min(loss1, loss2).expand(len(log_probs)).sum(), loss1 > loss2


@pytest.mark.parametrize("seed", range(4))
def test_it_is_that_of_trl(seed: int) -> None:
    counts = ragged(seed)
    settings = Settings(clip_low=0.02, clip_high=0.03)
    new = floats(sum(counts), -4, 0, seed).requires_grad_()
    old = new.detach() + floats(sum(counts), -0.5, 0.5, seed + 1)
    advantages = floats(len(counts), -2, 2, seed + 2)
    spread = advantages.repeat_interleave(torch.tensor(counts))
    found = loss(terms(counts, new), old, spread, settings)
    parts = zip(new.split(counts), old.split(counts), advantages, strict=True)
    expected = [trl(*part, settings) for part in parts]
    total = torch.stack([value for value, _ in expected])
    assert torch.allclose(torch.stack([part.sum() for part in found.loss_N.split(counts)]), total, atol=1e-6)
    assert torch.allclose(gradient(found.loss_N, new)[0], gradient(total, new)[0], atol=1e-6)
    clipped = [bool(part.all()) for part in found.metrics["clip_fraction"].split(counts)]
    assert clipped == [bool(was) for _, was in expected]
    assert True in clipped and False in clipped


def test_tokens_of_a_sequence_may_have_advantages_of_their_own() -> None:
    """At the old policy the gradient of each token is minus its advantage."""
    log_probs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    found = loss(terms([2, 1], log_probs), log_probs.detach(), torch.tensor([1.0, -2.0, 3.0]), Settings())
    assert gradient(found.loss_N, log_probs)[0].tolist() == [-1.0, 2.0, -3.0]
