"""Transfer: tokens that were sampled in another context, such as with a hint or a critique, are trained in the datum's.

The log-probabilities of their sampling belong to the other context and have no place here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mulligan.trainer.objective import Loss, Objective, Terms, Unusable, where_given
from mulligan.trainer.objectives.policy_gradient import chosen_loss

if TYPE_CHECKING:
    from mulligan.trainer.loss_settings import LossSettings


@dataclass(frozen=True, slots=True)
class Transfer(Objective):
    """−A·g(π). g is log π, as in ERL (arXiv 2602.13949). With `shape` γ > 0 it is π/(π + γ), as in Critique-GRPO (arXiv
    2506.03106, γ = 0.1).

    With `ratio` 1 it is the policy gradient that `[loss]` chooses, with its clipping and its terms of divergence and
    entropy, as in RuscaRL (arXiv 2508.16949). The ratio is to the old policy in the datum's context: without
    `old_log_probs`, which Forward gives, the present weights are the old policy. No mismatch is corrected.

    `advantages`, one per trained token, take the place of `advantage`, which is 0 then.
    """

    advantage: float
    shape: float = 0.0
    old_log_probs: tuple[float, ...] = ()
    ratio: float = 0.0
    advantages: tuple[float, ...] = ()

    def moves(self, settings: LossSettings) -> bool:
        return any((self.advantage, *self.advantages)) or (self.ratio == 1 and settings.regularizes)

    @property
    def compares_with_old(self) -> bool:
        return self.ratio == 1

    def unusable(self, trained_ids: tuple[int, ...]) -> Unusable | None:
        if self.shape < 0:
            return Unusable("shape", "a number of at least 0", str(self.shape))
        if self.ratio not in (0, 1):
            return Unusable("ratio", "0 or 1", str(self.ratio))
        if self.shape and self.ratio:
            return Unusable("shape", "0, because there is a `ratio`", str(self.shape))
        if self.old_log_probs and not self.ratio:
            return Unusable("old_log_probs", "none, because `ratio` is 0", str(len(self.old_log_probs)))
        if self.advantage and self.advantages:
            return Unusable("advantage", "0, because there are `advantages`", str(self.advantage))
        return None


Inputs = Transfer


def loss(terms: Terms, settings: LossSettings) -> Loss:
    log_probs_N = terms.log_probs_N
    shape_N = terms.per_token(terms.numbers["shape"])
    is_ratio_N = terms.per_token(terms.numbers["ratio"]) == 1
    advantages_N = where_given(terms.token_values["advantages"], terms.per_token(terms.numbers["advantage"]))
    probs_N = log_probs_N.exp()
    # Also where a form is not used, its gradient must be finite: hence the denominators.
    shaped_N = probs_N / (probs_N + shape_N.where(shape_N > 0, 1.0))
    loss_N = -advantages_N * shaped_N.where(shape_N > 0, log_probs_N)
    if not is_ratio_N.any():
        return Loss(loss_N)
    old_N = where_given(terms.token_values["old_log_probs"], log_probs_N.detach())
    chosen = chosen_loss(terms, old_N, advantages_N, settings)
    return Loss(chosen.loss_N.where(is_ratio_N, loss_N), chosen.metrics if is_ratio_N.all() else {})
