"""Negative-aware fine-tuning (NFT, arXiv 2505.18116): supervised learning that also uses wrong answers.

A wrong answer trains an implicit negative policy, which the policy and its share of right answers define.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mulligan.trainer.loss_terms import MAX_LOG_RATIO
from mulligan.trainer.objective import Loss, Objective, Terms, Unusable, where_given

if TYPE_CHECKING:
    from mulligan.trainer.loss_settings import LossSettings

# The success rate is kept within these, as in the paper's code: a group without right answers says little.
LOWEST_RATE = 0.02
HIGHEST_RATE = 0.98


@dataclass(frozen=True, slots=True)
class NegativeAware(Objective):
    """`right` is 1 for a right answer and 0 for a wrong one; `success_rate` is the share of right ones in the group.
    Without `old_log_probs`, which Forward gives, the present weights are the old policy."""

    right: float
    success_rate: float
    old_log_probs: tuple[float, ...] = ()

    @property
    def compares_with_old(self) -> bool:
        return True

    def unusable(self, trained_ids: tuple[int, ...]) -> Unusable | None:
        if self.right not in (0, 1):
            return Unusable("right", "0 or 1", str(self.right))
        if not 0 <= self.success_rate <= 1:
            return Unusable("success_rate", "a number from 0 to 1", str(self.success_rate))
        return None


Inputs = NegativeAware


def loss(terms: Terms, settings: LossSettings) -> Loss:
    """(1 − q) times −log ρ for a token of a right answer, or −log max((1 − q·ρ)/(1 − q), 1) for one of a wrong answer,
    whose gradient passes straight through the maximum. ρ = π/π_old, q = success rate.

    At ρ = 1 the gradient is that of a policy gradient with advantage `right` − q."""
    old_N = where_given(terms.token_values["old_log_probs"], terms.log_probs_N.detach())
    rate_N = terms.per_token(terms.numbers["success_rate"]).clamp(LOWEST_RATE, HIGHEST_RATE)
    log_ratio_N = (terms.log_probs_N - old_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    negative_N = (1 - rate_N * log_ratio_N.exp()) / (1 - rate_N)
    bounded_N = negative_N.detach().clamp(min=1) + (negative_N - negative_N.detach())  # in this order it is exact
    right_N = terms.per_token(terms.numbers["right"]) == 1
    loss_N = (-log_ratio_N).where(right_N, -bounded_N.log())
    return Loss((1 - rate_N) * loss_N, {"ratio": log_ratio_N.exp()})
