"""PPO (arXiv 1707.06347) with clip-higher (DAPO, arXiv 2503.14476) and dual clip (arXiv 1912.09729)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from mulligan.common.plugins import located
from mulligan.trainer.loss_settings import LossSettings
from mulligan.trainer.loss_terms import ratio
from mulligan.trainer.objective import Loss, Terms

if TYPE_CHECKING:
    from torch import Tensor


class Settings(LossSettings):
    name: str = "ppo"
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0)
    dual_clip: float = Field(3.0, ge=0)

    @model_validator(mode="after")
    def _dual_clip_is_off_or_above_one(self) -> Self:
        if 0 < self.dual_clip <= 1:
            raise located({("dual_clip",): "expected 0 (off) or a number above 1"})
        return self


def loss(terms: Terms, old_log_probs_N: Tensor, advantages_N: Tensor, settings: Settings) -> Loss:
    loss_N, clipped_N = clipped_policy_gradient(
        terms.log_probs_N,
        old_log_probs_N,
        advantages_N,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    return Loss(loss_N, {"clip_fraction": clipped_N})


def clipped_policy_gradient(
    log_probs_N: Tensor,
    old_log_probs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Tensor]:
    """PPO's loss, and whether each token was clipped, which removes its gradient.

    −min(ρA, clip(ρ, 1 − low, 1 + high)·A) with ρ = π/π_old: PPO (arXiv 1707.06347), equation 7, with separate bounds as
    in DAPO (arXiv 2503.14476), section 3.1. For A < 0 the loss is at most −c·A: dual clip (arXiv 1912.09729);
    `dual_clip` 0 switches that off.
    """
    ratio_N = ratio(log_probs_N, old_log_probs_N)
    free_N = -advantages_N * ratio_N
    bounded_N = -advantages_N * ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = free_N.maximum(bounded_N)
    clipped_N = bounded_N > free_N
    if dual_clip:
        ceiling_N = -advantages_N * dual_clip
        above_N = (advantages_N < 0) & (loss_N > ceiling_N)
        loss_N = ceiling_N.where(above_N, loss_N)
        clipped_N = clipped_N | above_N
    return loss_N, clipped_N
