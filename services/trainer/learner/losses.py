"""Losses per trained token, as pure functions.

Shapes: _N is the trained tokens of a micro-batch, one sequence after another. Every function returns one value per
token, in nats; the learner applies the data's weights and sums up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mulligan.trainer.settings import MismatchCorrection

# exp() of more overflows half precision.
MAX_LOG_RATIO = 20.0


def ratio(numerator_log_probs_N: Tensor, denominator_log_probs_N: Tensor) -> Tensor:
    """Ratio of two probabilities from their logarithms."""
    return (numerator_log_probs_N - denominator_log_probs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


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
    loss_N = torch.maximum(free_N, bounded_N)
    clipped_N = bounded_N > free_N
    if dual_clip:
        ceiling_N = -advantages_N * dual_clip
        above_N = (advantages_N < 0) & (loss_N > ceiling_N)
        loss_N = torch.where(above_N, ceiling_N, loss_N)
        clipped_N = clipped_N | above_N
    return loss_N, clipped_N


def mismatch_weights(
    old_log_probs_N: Tensor, rollout_log_probs_N: Tensor, correction: MismatchCorrection, limit: float
) -> Tensor:
    """Weights that correct for sampling with an inference engine whose probabilities differ from the learner's.

    With w = π_old(learner) / π_rollout(engine): TRUNCATED gives min(w, limit), truncated importance sampling
    (https://fengyao.notion.site/off-policy-rl); MASKED gives w where 1/limit ≤ w ≤ limit and 0 elsewhere (IcePop,
    arXiv 2510.18855); NONE gives 1. The weights have no gradient.
    """
    if correction is MismatchCorrection.NONE:
        return torch.ones_like(old_log_probs_N)
    weights_N = ratio(old_log_probs_N, rollout_log_probs_N).detach()
    if correction is MismatchCorrection.TRUNCATED:
        return weights_N.clamp(max=limit)
    inside_N = (weights_N >= 1 / limit) & (weights_N <= limit)
    return torch.where(inside_N, weights_N, 0.0)


def kl_estimate(log_probs_N: Tensor, reference_log_probs_N: Tensor) -> Tensor:
    """The k3 estimate of KL(π ‖ π_ref) on tokens sampled from π: r − log r − 1 with r = π_ref/π; never negative.

    http://joschu.net/blog/kl-approx.html; as a loss term in GRPO (arXiv 2402.03300), equation 4.
    """
    log_ratio_N = (reference_log_probs_N - log_probs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio_N) - log_ratio_N


def distillation(log_probs_N: Tensor, target_weights_N: Tensor) -> Tensor:
    """−w·log π(token | context): internalisation in ERL (arXiv 2602.13949), weighted as in RAFT (arXiv 2304.06767).

    The tokens were sampled in another context, so the probabilities of their sampling are not used: there is no
    importance weighting.
    """
    return -target_weights_N * log_probs_N
