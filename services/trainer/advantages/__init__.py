"""Advantage estimators, a module each: from rewards to the number that multiplies a sampled token's policy gradient.

A module exports `Settings`, a `PluginSettings`, and

    estimate(groups: Sequence[Sequence[Return]], settings: Settings) -> list[list[Advantage]]

a pure function of plain numbers. `groups` are all groups of one branch in one step; a group holds the samples of one
task and one role, such as its first attempts. The result has the shape of `groups`; numbers and arrays of other
libraries are read, too. Groups may differ in size and may
be empty. All numbers of the result are finite if those of `groups` are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any

from mulligan.common.plugins import Plugins, PluginSettings, read_table

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


def estimated(name: str, table: Mapping[str, Any], groups: Sequence[Sequence[Return]]) -> list[list[Advantage]]:
    """What the estimator of this name, with these settings, gives for the groups, as plain numbers.

    Raises ValueError, which names the estimator, where it raises, or does not give one number, or one per sampled
    token, for each sample.
    """
    estimator = ADVANTAGES.find(name)
    settings = read_table(estimator.Settings, table)
    try:
        found = [list(group) for group in estimator.estimate(groups, settings)]
    except Exception as error:  # foreign code may raise anything
        raise ValueError(f"advantage estimator {name!r} raised {type(error).__name__}: {error}") from error
    sizes = [len(group) for group in groups], [len(group) for group in found]
    if sizes[0] != sizes[1]:
        raise ValueError(f"advantage estimator {name!r}: expected groups of {sizes[0]} samples, got {sizes[1]}")
    try:
        return [
            [_plain(given, sample) for given, sample in zip(group, told, strict=True)]
            for group, told in zip(found, groups, strict=True)
        ]
    except ValueError as error:
        raise ValueError(f"advantage estimator {name!r}: {error}") from error


def _plain(given: Any, sample: Return) -> Advantage:
    """One number, or a tuple of one per sampled token. Raises ValueError."""
    if isinstance(given, float | int):
        return float(given)
    expected = "expected a number or one per sampled token"
    if isinstance(given, str | bytes | Mapping | Set):
        raise ValueError(f"{expected}, got {shortened(given)}")
    try:
        several = _several(given)
        if several is None:
            return float(given)
        plain = tuple(map(float, several))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{expected}, got {shortened(given)}") from error
    if len(plain) != sample.tokens:
        raise ValueError(f"expected one number per sampled token of a sample, {sample.tokens}, got {len(plain)}")
    return plain


def _several(given: Any) -> list[Any] | None:
    """The numbers in a sequence or array. None for a number, which an array without dimensions is, too."""
    try:
        return list(given)
    except TypeError:
        return None
