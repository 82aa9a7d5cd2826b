"""Transfer: tokens that were sampled in another context, such as with a hint or a critique, are trained in the datum's.

The log-probabilities of their sampling belong to the other context and have no place here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mulligan.trainer.loss_terms import ratio
from mulligan.trainer.objective import Loss, Objective, Terms, Unusable, where_given

if TYPE_CHECKING:
    from mulligan.trainer.loss_settings import LossSettings


@dataclass(frozen=True, slots=True)
class Transfer(Objective):
    """−A·g(π). g is log π, as in ERL (arXiv 2602.13949). With `shape` γ > 0 it is π/(π + γ), as in Critique-GRPO (arXiv
    2506.03106, γ = 0.1). With `old_log_probs`, those of Forward in the datum's context, it is the ratio to that policy,
    unclipped, as in RuscaRL (arXiv 2508.16949)."""

    advantage: float
    shape: float = 0.0
    old_log_probs: tuple[float, ...] = ()

    def moves(self, settings: LossSettings) -> bool:
        return self.advantage != 0

    def unusable(self, trained_ids: tuple[int, ...]) -> Unusable | None:
        if self.shape < 0:
            return Unusable("shape", "a number of at least 0", str(self.shape))
        if self.shape and self.old_log_probs:
            return Unusable("shape", "0, because there are `old_log_probs`", str(self.shape))
        return None


Inputs = Transfer


def loss(terms: Terms, settings: LossSettings) -> Loss:
    log_probs_N = terms.log_probs_N
    old_N = terms.token_values["old_log_probs"]
    shape_N = terms.per_token(terms.numbers["shape"])
    is_ratio_N = ~old_N.isnan()
    probs_N = log_probs_N.exp()
    # Also where a form is not used, its gradient must be finite: hence the denominators.
    shaped_N = probs_N / (probs_N + shape_N.where(shape_N > 0, 1.0))
    ratio_N = ratio(log_probs_N, where_given(old_N, log_probs_N.detach()))
    g_N = ratio_N.where(is_ratio_N, shaped_N.where(shape_N > 0, log_probs_N))
    return Loss(-terms.per_token(terms.numbers["advantage"]) * g_N)
