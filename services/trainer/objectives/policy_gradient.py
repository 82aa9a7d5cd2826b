"""Policy gradient on sampled tokens. `[loss]` chooses its form (`mulligan.trainer.losses`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mulligan.trainer.loss_terms import kl_estimate, mismatch_weights
from mulligan.trainer.losses import loss_named
from mulligan.trainer.objective import Loss, Objective, Terms, Unusable, where_given

if TYPE_CHECKING:
    from torch import Tensor

    from mulligan.trainer.loss_settings import LossSettings


@dataclass(frozen=True, slots=True)
class PolicyGradient(Objective):
    """One value per trained token in each tuple. Without `old_log_probs`, the present weights are PPO's old policy.

    `advantages` take the place of `advantage`, which is 0 then.
    """

    advantage: float
    rollout_log_probs: tuple[float, ...]
    old_log_probs: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()

    @property
    def compares_with_old(self) -> bool:
        return True

    def moves(self, settings: LossSettings) -> bool:
        return settings.regularizes or any((self.advantage, *self.advantages))

    def unusable(self, trained_ids: tuple[int, ...]) -> Unusable | None:
        if self.advantage and self.advantages:
            return Unusable("advantage", "0, because there are `advantages`", str(self.advantage))
        return None


Inputs = PolicyGradient


def loss(terms: Terms, settings: LossSettings) -> Loss:
    old_N = where_given(terms.token_values["old_log_probs"], terms.log_probs_N.detach())
    rollout_N = terms.token_values["rollout_log_probs"]
    advantages_N = where_given(terms.token_values["advantages"], terms.per_token(terms.numbers["advantage"]))
    weights_N = mismatch_weights(
        old_N,
        rollout_N,
        settings.mismatch_correction,
        settings.mismatch_limit,
        lambda values_N: terms.per_token(terms.means(values_N)),
    )
    loss_N, metrics = chosen_loss(terms, old_N, advantages_N, settings, weights_N)
    return Loss(loss_N, {**metrics, "mismatch_kl": kl_estimate(rollout_N, old_N)})


def chosen_loss(
    terms: Terms, old_log_probs_N: Tensor, advantages_N: Tensor, settings: LossSettings, weights_N: Tensor | float = 1.0
) -> Loss:
    """The loss that `[loss]` chooses, times the weights, with its terms of entropy and divergence."""
    loss_N, metrics = loss_named(settings.name)(terms, old_log_probs_N, advantages_N, settings)
    loss_N = weights_N * loss_N - settings.entropy_coefficient * terms.entropy_N
    metrics = {**metrics}
    if settings.kl_coefficient > 0:
        metrics["kl"] = kl_estimate(terms.log_probs_N, terms.reference(), settings.kl_estimator)
        loss_N = loss_N + settings.kl_coefficient * metrics["kl"]
    return Loss(loss_N, metrics)
