"""A loss of policy gradients outside of the tree, with settings of its own: a tilt of the advantages."""

from __future__ import annotations

from torch import Tensor

from mulligan.trainer.loss_settings import LossSettings
from mulligan.trainer.objective import Loss, Terms


class Settings(LossSettings):
    name: str = "tilted"
    tilt: float = 0.0
    rounds: int = 3
    names: tuple[str, ...] = ()


def loss(terms: Terms, old_log_probs_N: Tensor, advantages_N: Tensor, settings: Settings) -> Loss:
    tilted_N = advantages_N + settings.tilt
    return Loss(-tilted_N * terms.log_probs_N, {"tilted": tilted_N})
