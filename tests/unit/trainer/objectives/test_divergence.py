"""What a divergence refuses, and where it has no gradient; `tests/reference/test_trl.py` compares it with TRL."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mulligan.trainer.objective import Tokens
from mulligan.trainer.objectives.divergence import Divergence, divergence
from tests.support.terms import floats, gradient


def test_there_is_no_gradient_between_equal_distributions() -> None:
    logits = floats(5 * 9, -3, 3, 0).view(5, 9).requires_grad_()
    betas = torch.tensor([0.0, 1.0, 0.5, 0.9, 0.1], dtype=torch.float64)
    found = divergence(logits.log_softmax(-1), logits.detach().log_softmax(-1), betas)
    assert torch.allclose(found, torch.zeros(5, dtype=torch.float64), atol=1e-9)
    assert gradient(found, logits)[0].abs().max() < 1e-9


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_token_that_neither_can_say_counts_nothing(beta: float) -> None:
    """Values and gradients are those over the other tokens."""
    teacher = floats(3 * 5, -3, 3, 1).view(3, 5).log_softmax(-1)
    betas = torch.full((3,), beta, dtype=torch.float64)

    def measured(ruled_out: float, columns: int) -> tuple[Tensor, Tensor]:
        logits = floats(3 * 5, -3, 3, 0).view(3, 5).requires_grad_()
        wide = torch.cat([logits, logits.new_full((3, columns), ruled_out)], -1)
        taught = torch.cat([teacher, teacher.new_full((3, columns), ruled_out)], -1)
        found = divergence(wide.log_softmax(-1), taught, betas)
        return found.detach(), gradient(found, logits)[0]

    values, slopes = measured(-torch.inf, 2)
    expected_values, expected_slopes = measured(0.0, 0)
    assert torch.allclose(values, expected_values) and torch.allclose(slopes, expected_slopes)


@pytest.mark.parametrize(("beta", "expected"), [(0.0, torch.inf), (1.0, 0.6931471805599453)])
def test_a_token_that_one_of_the_two_can_say_counts(beta: float, expected: float) -> None:
    half = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    one = torch.tensor([[1.0, 0.0]], dtype=torch.float64).log()
    assert divergence(one, half, torch.tensor([beta])).item() == expected


def test_the_teacher_must_have_the_same_trained_tokens() -> None:
    teacher = Tokens((9, 9, 9, 3, 4), (False, False, False, True, True))
    assert Divergence(teacher).unusable((3, 4)) is None
    for trained in ((3, 5), (3,), (3, 4, 5)):
        unusable = Divergence(teacher).unusable(trained)
        assert unusable is not None and unusable.field == "teacher"
    for beta in (-0.1, 1.1):
        unusable = Divergence(teacher, beta).unusable((3, 4))
        assert unusable is not None and unusable.field == "beta"
