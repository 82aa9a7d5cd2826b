"""CISPO by hand; `tests/reference/test_trl.py` compares it with TRL, which has no lower bound."""

from __future__ import annotations

import pytest
import torch

from mulligan.trainer.losses.cispo import Settings, loss
from tests.support.terms import gradient, terms


def test_a_clipped_token_keeps_a_gradient() -> None:
    log_probs = torch.tensor([0.0, -1.0], requires_grad=True)
    old = torch.tensor([-3.0, -0.5])
    found = loss(terms([2], log_probs), old, torch.tensor([1.0, -1.0]), Settings(clip_low=0.2, clip_high=0.5))
    assert gradient(found.loss_N, log_probs)[0].tolist() == pytest.approx([-1.5, 0.8])
    assert found.metrics["clip_fraction"].tolist() == [True, True]
