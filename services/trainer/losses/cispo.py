"""CISPO (MiniMax-M1, arXiv 2506.13585): clipped importance ratios as weights of the log-probabilities.

PPO's clipping removes the gradient of a clipped token. Here it stays, with a bounded weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from mulligan.trainer.loss_settings import LossSettings
from mulligan.trainer.loss_terms import ratio
from mulligan.trainer.objective import Loss, Terms

if TYPE_CHECKING:
    from torch import Tensor


class Settings(LossSettings):
    """Ratios outside [1 − clip_low, 1 + clip_high] are clipped. The paper sets no lower bound; the upper one is that of
    ScaleRL (arXiv 2510.13786), 5."""

    name: str = "cispo"
    clip_low: float = Field(1.0, gt=0, le=1)
    clip_high: float = Field(4.0, gt=0)


def loss(terms: Terms, old_log_probs_N: Tensor, advantages_N: Tensor, settings: Settings) -> Loss:
    """−sg[clip(ρ)]·A·log π, with ρ = π/π_old: equations 4 and 5."""
    ratio_N = ratio(terms.log_probs_N, old_log_probs_N).detach()
    bounded_N = ratio_N.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return Loss(-bounded_N * advantages_N * terms.log_probs_N, {"clip_fraction": bounded_N != ratio_N})
