"""What a learner learns from. Mirrors `Datum` of `mulligan.trainer.v1`.

The two objectives are two types on purpose: a distilled datum was generated under another context than it is trained
under, so no log-probability of its sampling may reach the loss. It has no field to carry one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """One value per trained token in each tuple. Without `old_log_probs`, the present weights are PPO's old policy."""

    advantage: float
    rollout_log_probs: tuple[float, ...]
    old_log_probs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Distillation:
    target_weight: float


@dataclass(frozen=True, slots=True)
class Datum:
    """One token sequence. Its loss is the sum over the trained tokens times `weight`; the first token is never trained.

    `temperature` is that of sampling (> 0): logits are divided by it before the softmax.
    """

    datum_id: str
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    weight: float
    temperature: float
    objective: PolicyGradient | Distillation
    branch: str
