"""An objective that fails in one of several processes, and nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mulligan.trainer.loss_settings import LossSettings
from mulligan.trainer.objective import Loss, Objective, Terms


@dataclass(frozen=True, slots=True)
class Failing(Objective):
    rank: float


Inputs = Failing


def loss(terms: Terms, settings: LossSettings) -> Loss:
    if terms.numbers["rank"][0] == int(os.environ["RANK"]):
        raise RuntimeError("planted")
    return Loss(-terms.log_probs_N)
