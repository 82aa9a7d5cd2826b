"""GSPO by hand; `tests/reference/test_trl.py` compares it with TRL."""

from __future__ import annotations

import torch

from mulligan.trainer.losses.gspo import Settings, loss
from tests.support.terms import gradient, terms


def test_tokens_of_a_sequence_may_have_advantages_of_their_own() -> None:
    """At the old policy the gradient of each token is minus its advantage."""
    log_probs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    found = loss(terms([2, 1], log_probs), log_probs.detach(), torch.tensor([1.0, -2.0, 3.0]), Settings())
    assert gradient(found.loss_N, log_probs)[0].tolist() == [-1.0, 2.0, -3.0]
