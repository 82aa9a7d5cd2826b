"""Advantage estimators, a module each: from rewards to the number that multiplies a sampled token's policy gradient.

A module exports `Settings`, a `PluginSettings`, and

    estimate(groups: Sequence[Sequence[Return]], settings: Settings) -> list[list[Advantage]]

a pure function of plain numbers. `groups` are all groups of one branch in one step; a group holds the samples of one
task and one role, such as its first attempts. The result has the shape of `groups`. Groups may differ in size and may
be empty. All numbers of the result are finite if those of `groups` are.
"""

from __future__ import annotations

from dataclasses import dataclass

from mulligan.common.plugins import Plugins, PluginSettings

ADVANTAGES = Plugins(
    noun="advantage estimator",
    package=__name__,
    group="mulligan.advantages",
    exports=("Settings", "estimate"),
    default="grpo",
    settings=PluginSettings,
)

# One number for all sampled tokens of a sample, or one per sampled token, in order.
Advantage = float | tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Return:
    """What an estimator is told of one sample.

    `turn_rewards` and `turn_tokens` have one value per turn: its reward, and how many tokens were sampled in it. A
    sample without turns, such as a reflection, counts as one turn. `truncated`: a limit cut it. `reward_before` is the
    reward of the attempt that it improves on, None if there is none. Raises ValueError if the two tuples differ in
    length.
    """

    reward: float
    turn_rewards: tuple[float, ...]
    turn_tokens: tuple[int, ...]
    truncated: bool = False
    reward_before: float | None = None

    def __post_init__(self) -> None:
        rewards, tokens = len(self.turn_rewards), len(self.turn_tokens)
        if rewards != tokens:
            raise ValueError(f"expected one reward and one number of tokens per turn, got {rewards} and {tokens}")

    @property
    def tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(self.turn_tokens)
