"""Transfer: each of its forms, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mulligan.trainer.objectives.transfer import Transfer, loss
from mulligan.trainer.settings import LossSettings
from tests.support.terms import gradient, terms


def test_each_form_in_one_batch() -> None:
    """log p, p/(p + γ) and p/p_old, each with its derivative by log p: 1, γp/(p + γ)² and the ratio itself."""
    probs = [0.5, 0.01, 0.2]
    log_probs = torch.tensor([math.log(prob) for prob in probs], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([math.nan, math.nan, math.log(0.1)], dtype=torch.float64)
    advantages = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    shapes = torch.tensor([0.0, 0.1, 0.0], dtype=torch.float64)
    found = loss(
        terms(
            [1, 1, 1],
            log_probs,
            numbers={"advantage": advantages, "shape": shapes},
            token_values={"old_log_probs": old},
        ),
        LossSettings(),
    )
    assert found.loss_N.tolist() == pytest.approx([-math.log(0.5), -2 * 0.01 / 0.11, 2.0])
    derivatives = [-1.0, -2 * 0.1 * 0.01 / 0.11**2, 2.0]
    assert gradient(found.loss_N, log_probs)[0].tolist() == pytest.approx(derivatives)


@pytest.mark.parametrize("log_prob", [-200.0, 0.0])
def test_extreme_probabilities_have_finite_gradients(log_prob: float) -> None:
    log_probs = torch.tensor([log_prob, log_prob], requires_grad=True)
    numbers = {"advantage": torch.tensor([1.0, 1.0]), "shape": torch.tensor([0.0, 0.1])}
    found = loss(terms([1, 1], log_probs, numbers=numbers, token_values={"old_log_probs": None}), LossSettings())
    assert gradient(found.loss_N, log_probs)[0].isfinite().all()


def test_two_forms_at_once_are_refused() -> None:
    for wrong in (Transfer(1.0, 0.1, (-1.0,)), Transfer(1.0, -0.1)):
        unusable = wrong.unusable((3,))
        assert unusable is not None and unusable.field == "shape"
    assert Transfer(1.0, 0.1).unusable((3,)) is None and not Transfer(0.0).moves(LossSettings())
