"""Whether a group teaches anything: whether the data that it is trained on have a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mulligan.common.experience import Experience
from mulligan.common.rewards import exceeds
from mulligan.trainer.batch import Group
from mulligan.trainer.data import Datum
from mulligan.trainer.loss_settings import LossSettings


def moves(data: Sequence[Datum], loss: LossSettings) -> bool:
    """Whether any of the data has a gradient of its own, beside the terms that hold the policy near a reference."""
    alone = loss.model_copy(update={"kl_coefficient": 0.0, "entropy_coefficient": 0.0})
    return any(datum.weight and datum.objective.moves(alone) for datum in data)


def rounded(group: Group) -> Group:
    """The group, in which rewards that differ by rounding alone are equal: their difference is no signal."""
    rewards = {sample.reward for one in group for sample in one.samples if sample.reward is not None}
    least: dict[float, float] = {}  # of those that are equal to a reward
    base = None
    for reward in sorted(rewards):
        if base is None or exceeds(reward, base):
            base = reward
        least[reward] = base
    return [_with_rewards(one, least) for one in group] if len({*least.values()}) < len(least) else group


def _with_rewards(one: Experience, new: dict[float, float]) -> Experience:
    return replace(
        one,
        samples=tuple(
            sample if sample.reward is None else replace(sample, reward=new[sample.reward]) for sample in one.samples
        ),
    )
