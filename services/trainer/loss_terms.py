"""Terms that losses have in common, per trained token, as pure functions.

Shapes: _N is the trained tokens of a micro-batch, one sequence after another. Every function returns one value per
token, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class MismatchCorrection(StrEnum):
    NONE = "none"
    TRUNCATED = "truncated"
    MASKED = "masked"
    SEQUENCE_MASKED = "sequence_masked"


class KlEstimator(StrEnum):
    K1 = "k1"
    K2 = "k2"
    K3 = "k3"


class KlReference(StrEnum):
    INITIAL = "initial"
    MOVING = "moving"


# exp() of more overflows half precision.
MAX_LOG_RATIO = 20.0


def ratio(numerator_log_probs_N: Tensor, denominator_log_probs_N: Tensor) -> Tensor:
    """Ratio of two probabilities from their logarithms."""
    return (numerator_log_probs_N - denominator_log_probs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def mismatch_weights(
    old_log_probs_N: Tensor,
    rollout_log_probs_N: Tensor,
    correction: MismatchCorrection,
    limit: float,
    means_N: Callable[[Tensor], Tensor] = lambda values_N: values_N.mean().expand_as(values_N),
) -> Tensor:
    """Weights that correct for sampling with an inference engine whose probabilities differ from the learner's.

    With w = π_old(learner) / π_rollout(engine): TRUNCATED gives min(w, limit), truncated importance sampling
    (https://fengyao.notion.site/off-policy-rl); MASKED gives w where 1/limit ≤ w ≤ limit and 0 elsewhere (IcePop,
    arXiv 2510.18855); SEQUENCE_MASKED gives 1 to all tokens of a sequence if the geometric mean of their w is within
    these limits, and else 0 (https://richardli.xyz/rl-collapse); NONE gives 1. The weights have no gradient.

    `means_N` returns for each token the mean over its sequence; without it all tokens are of one sequence.
    """
    if correction is MismatchCorrection.NONE:
        return old_log_probs_N.new_ones(old_log_probs_N.shape)
    if correction is MismatchCorrection.SEQUENCE_MASKED:
        distances_N = means_N((old_log_probs_N - rollout_log_probs_N).detach()).abs()
        return (distances_N <= math.log(limit)).to(old_log_probs_N.dtype)
    weights_N = ratio(old_log_probs_N, rollout_log_probs_N).detach()
    if correction is MismatchCorrection.TRUNCATED:
        return weights_N.clamp(max=limit)
    inside_N = (weights_N >= 1 / limit) & (weights_N <= limit)
    return weights_N.where(inside_N, 0.0)


def kl_estimate(log_probs_N: Tensor, reference_log_probs_N: Tensor, estimator: KlEstimator = KlEstimator.K3) -> Tensor:
    """An estimate of KL(π ‖ π_ref) on tokens sampled from π, from r = π_ref/π (http://joschu.net/blog/kl-approx.html).

    K3 is r − log r − 1, never negative; as a loss term in GRPO (arXiv 2402.03300), equation 4. DeepSeek-V3.2 (arXiv
    2512.02556) multiplies it by π/π_old; that is not done here. K1 is −log r, whose gradient as a loss term is 0 on
    average over tokens from π. K2 is (log r)²/2, whose gradient as a loss term is that of the divergence.
    """
    log_ratio_N = (reference_log_probs_N - log_probs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match estimator:
        case KlEstimator.K1:
            return -log_ratio_N
        case KlEstimator.K2:
            return log_ratio_N.square() / 2
        case _:
            return log_ratio_N.expm1() - log_ratio_N
