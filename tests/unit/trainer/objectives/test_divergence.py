"""What a divergence refuses, and where it has no gradient; `tests/reference/test_trl.py` compares it with TRL."""

from __future__ import annotations

import torch

from mulligan.trainer.objective import Tokens
from mulligan.trainer.objectives.divergence import Divergence, divergence
from tests.support.terms import floats, gradient


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
