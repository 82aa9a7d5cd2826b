"""GSPO (arXiv 2507.18071): one importance ratio for each sequence, the geometric mean of the ratios of its tokens.

Computed in the token-wise form of its section 4.3, which has the same values and gradients where the advantages of a
sequence are equal, and allows other ones. The paper divides a sequence's loss by its length:
`Aggregation.SEQUENCE_MEAN_TOKEN_MEAN`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from mulligan.trainer.loss_settings import LossSettings
from mulligan.trainer.loss_terms import MAX_LOG_RATIO
from mulligan.trainer.objective import Loss, Terms

if TYPE_CHECKING:
    from torch import Tensor


class Settings(LossSettings):
    """Ratios outside [1 − clip_low, 1 + clip_high] are clipped; the paper's values, section 5.1."""

    name: str = "gspo"
    clip_low: float = Field(3e-4, gt=0, lt=1)
    clip_high: float = Field(4e-4, gt=0)


def loss(terms: Terms, old_log_probs_N: Tensor, advantages_N: Tensor, settings: Settings) -> Loss:
    """−min(s·A, clip(s)·A) for each token, with s = exp(mean over the sequence of log π/π_old)."""
    log_probs_N = terms.log_probs_N
    log_ratio_N = terms.per_token(terms.means(log_probs_N - old_log_probs_N)).detach()
    # The value is the sequence's, the gradient the token's own.
    ratio_N = (log_ratio_N + log_probs_N - log_probs_N.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free_N = -advantages_N * ratio_N
    bounded_N = -advantages_N * ratio_N.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return Loss(free_N.maximum(bounded_N), {"clip_fraction": bounded_N > free_N})
