"""−Σ c·log π(token): any loss of first order. The caller asks `Forward` for log-probabilities, computes in any language
the derivative of its loss with respect to each, and gives minus the derivatives as coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mulligan.trainer.objective import Loss, Objective, Terms

if TYPE_CHECKING:
    from mulligan.trainer.loss_settings import LossSettings


@dataclass(frozen=True, slots=True)
class Coefficients(Objective):
    coefficients: tuple[float, ...]

    def moves(self, settings: LossSettings) -> bool:
        return any(self.coefficients)


Inputs = Coefficients


def loss(terms: Terms, settings: LossSettings) -> Loss:
    return Loss(-terms.token_values["coefficients"] * terms.log_probs_N)
