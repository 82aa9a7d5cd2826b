"""Self-distillation: the divergence between the present model in the datum's context and in another one, the teacher.

The teacher sees more, such as a reflection or an answer, and has no gradient. The divergence is that of generalised
knowledge distillation (GKD, arXiv 2306.13649), over the whole vocabulary, at each trained token.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, ClassVar

from mulligan.trainer.objective import Loss, Objective, Terms, Tokens, Unusable

if TYPE_CHECKING:
    from torch import Tensor

    from mulligan.trainer.loss_settings import LossSettings


@dataclass(frozen=True, slots=True)
class Divergence(Objective):
    """`teacher` has the same trained tokens in another context. `beta` 0 is the forward KL(teacher ‖ student), 1 the
    reverse KL(student ‖ teacher); between them lies the generalised Jensen-Shannon divergence."""

    compared: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: Tokens
    beta: float = 0.0

    def unusable(self, trained_ids: tuple[int, ...]) -> Unusable | None:
        if not 0 <= self.beta <= 1:
            return Unusable("beta", "a number from 0 to 1", str(self.beta))
        if tuple(compress(self.teacher.token_ids, self.teacher.loss_mask)) != trained_ids:
            return Unusable("teacher", "the trained tokens of the datum", "others")
        return None


Inputs = Divergence


def loss(terms: Terms, settings: LossSettings) -> Loss:
    return Loss(terms.compare("teacher", divergence, terms.per_token(terms.numbers["beta"])))


def divergence(student_NV: Tensor, teacher_NV: Tensor, beta_N: Tensor) -> Tensor:
    """The divergence of each token, _N, from the log-probabilities of two distributions over the vocabulary _V."""
    values_N = student_NV.new_zeros(len(beta_N))
    for chosen_N, function in ((beta_N == 0, _forward), (beta_N == 1, _reverse), ((beta_N > 0) & (beta_N < 1), _mixed)):
        if chosen_N.any():
            found = function(student_NV[chosen_N], teacher_NV[chosen_N], beta_N[chosen_N, None])
            values_N = values_N.index_put((chosen_N,), found)
    return values_N


def _forward(student_NV: Tensor, teacher_NV: Tensor, beta_N1: Tensor) -> Tensor:
    return _kl(teacher_NV, student_NV)


def _reverse(student_NV: Tensor, teacher_NV: Tensor, beta_N1: Tensor) -> Tensor:
    return _kl(student_NV, teacher_NV)


def _mixed(student_NV: Tensor, teacher_NV: Tensor, beta_N1: Tensor) -> Tensor:
    """β·KL(teacher ‖ m) + (1 − β)·KL(student ‖ m), with the mixture m = β·teacher + (1 − β)·student.

    Where both probabilities are 0, the mixture counts nothing. A value stands there whose gradient is a number."""
    both_NV = teacher_NV.isneginf() & student_NV.isneginf()
    teacher_part_NV = teacher_NV.masked_fill(both_NV, 0.0) + beta_N1.log()
    mixture_NV = teacher_part_NV.logaddexp(student_NV.masked_fill(both_NV, 0.0) + (1 - beta_N1).log())
    beta_N = beta_N1[:, 0]
    return beta_N * _kl(teacher_NV, mixture_NV) + (1 - beta_N) * _kl(student_NV, mixture_NV)


def _kl(one_NV: Tensor, other_NV: Tensor) -> Tensor:
    """KL(one ‖ other). A token of probability 0 counts nothing: 0 · log 0 is 0, whatever the other says of it."""
    return (one_NV.exp() * (one_NV - other_NV).masked_fill(one_NV.isneginf(), 0.0)).sum(-1)
