"""An objective of another package: unlikelihood training (arXiv 1908.04319), −log(1 − p) for tokens to avoid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mulligan.trainer.objective import Loss, Objective, Terms, where_given

if TYPE_CHECKING:
    from mulligan.trainer.settings import LossSettings


@dataclass(frozen=True, slots=True)
class Unlikelihood(Objective):
    """`shares` weigh the tokens of the datum; without them each has 1."""

    strength: float
    shares: tuple[float, ...] = ()


Inputs = Unlikelihood


def loss(terms: Terms, settings: LossSettings) -> Loss:
    probs_N = terms.log_probs_N.exp()
    shares_N = where_given(terms.token_values["shares"], probs_N.new_ones(len(probs_N)))
    loss_N = -terms.per_token(terms.numbers["strength"]) * shares_N * (-probs_N).log1p()
    return Loss(loss_N, {"avoided": 1 - probs_N.detach()})
