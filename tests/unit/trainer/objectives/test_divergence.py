"""Divergences against TRL's formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mulligan.trainer.objective import Tokens
from mulligan.trainer.objectives.divergence import Divergence, divergence
from tests.support.terms import floats, gradient


def trl(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, beta: float) -> torch.Tensor:
    """trl.GKDTrainer.generalized_jsd_loss, summed over the vocabulary."""
    if beta == 0:
        jsd = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True)
    elif beta == 1:
        jsd = F.kl_div(teacher_log_probs, student_log_probs, reduction="none", log_target=True)
    else:
        weight = torch.tensor(beta, dtype=student_log_probs.dtype)
        mixture_log_probs = torch.logsumexp(
            torch.stack([student_log_probs + torch.log1p(-weight), teacher_log_probs + torch.log(weight)]), dim=0
        )
        kl_teacher = F.kl_div(mixture_log_probs, teacher_log_probs, reduction="none", log_target=True)
        kl_student = F.kl_div(mixture_log_probs, student_log_probs, reduction="none", log_target=True)
        jsd = weight * kl_teacher + (1 - weight) * kl_student
    return jsd.sum(-1)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_that_of_trl(seed: int) -> None:
    betas = [0.0, 1.0, 0.5, 0.9, 0.0, 0.1, 1.0]
    logits = floats(7 * 11, -3, 3, seed).view(7, 11).requires_grad_()
    teacher = floats(7 * 11, -3, 3, seed + 1).view(7, 11).log_softmax(-1)
    found = divergence(logits.log_softmax(-1), teacher, torch.tensor(betas, dtype=torch.float64))
    rows = zip(logits.log_softmax(-1), teacher, betas, strict=True)
    expected = torch.stack([trl(*row) for row in rows])
    assert torch.allclose(found, expected, atol=1e-6) and (found > 0).all()
    assert torch.allclose(gradient(found, logits)[0], gradient(expected, logits)[0], atol=1e-6)


def test_there_is_no_gradient_between_equal_distributions() -> None:
    logits = floats(5 * 9, -3, 3, 0).view(5, 9).requires_grad_()
    betas = torch.tensor([0.0, 1.0, 0.5, 0.9, 0.1], dtype=torch.float64)
    found = divergence(logits.log_softmax(-1), logits.detach().log_softmax(-1), betas)
    assert torch.allclose(found, torch.zeros(5, dtype=torch.float64), atol=1e-9)
    assert gradient(found, logits)[0].abs().max() < 1e-9


def test_the_teacher_must_have_the_same_trained_tokens() -> None:
    teacher = Tokens((9, 9, 9, 3, 4), (False, False, False, True, True))
    assert Divergence(teacher).unusable((3, 4)) is None
    for trained in ((3, 5), (3,), (3, 4, 5)):
        unusable = Divergence(teacher).unusable(trained)
        assert unusable is not None and unusable.field == "teacher"
    for beta in (-0.1, 1.1):
        unusable = Divergence(teacher, beta).unusable((3, 4))
        assert unusable is not None and unusable.field == "beta"
