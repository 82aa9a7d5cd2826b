"""Supervised learning: −w·log π(token | context). Internalisation in ERL (arXiv 2602.13949), weighted as in RAFT (arXiv
2304.06767).

The tokens were sampled in another context than they are trained in. So the log-probabilities of their sampling must not
reach the loss: there is no input for them, and no importance weighting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mulligan.trainer.objective import Loss, Objective, Terms

if TYPE_CHECKING:
    from mulligan.trainer.loss_settings import LossSettings


@dataclass(frozen=True, slots=True)
class Distillation(Objective):
    target_weight: float

    def moves(self, settings: LossSettings) -> bool:
        return self.target_weight != 0


Inputs = Distillation


def loss(terms: Terms, settings: LossSettings) -> Loss:
    return Loss(-terms.per_token(terms.numbers["target_weight"]) * terms.log_probs_N)
