"""Groups of samples for tests of advantage estimators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum

from hypothesis import strategies as st

from mulligan.trainer.advantages import Advantage, Return

Groups = Sequence[Sequence[Return]]

REWARDS = st.sampled_from([0.0, 1.0]) | st.floats(-10, 10)


@st.composite
def returns(draw: st.DrawFn, min_tokens: int = 1) -> Return:
    """A sample of one to four turns; its reward is the sum of theirs."""
    rewards = draw(st.lists(REWARDS, min_size=1, max_size=4))
    choices = 6 - min_tokens
    digits = draw(st.integers(0, choices ** len(rewards) - 1))  # all at once: to draw each takes long
    tokens = [min_tokens + digits // choices**turn % choices for turn in range(len(rewards))]
    before = draw(st.none() | REWARDS)
    return Return(fsum(rewards), tuple(rewards), tuple(tokens), draw(st.booleans()), before)


def groups(min_size: int = 1, min_tokens: int = 1) -> st.SearchStrategy[list[list[Return]]]:
    """One to four groups of different sizes."""
    return st.lists(st.lists(returns(min_tokens), min_size=min_size, max_size=5), min_size=1, max_size=4)


def sample(reward: float, *, truncated: bool = False, before: float | None = None, tokens: int = 2) -> Return:
    """A sample of one turn."""
    return Return(reward, (reward,), (tokens,), truncated, before)


def group(*rewards: float) -> list[Return]:
    return [sample(reward) for reward in rewards]


def per_token(of: Groups, advantages: Iterable[Iterable[Advantage]]) -> list[list[list[float]]]:
    """Advantages as one number per sampled token. Fails where their shape is not that of the groups."""
    return [
        [_tokens(item, advantage) for item, advantage in zip(items, found, strict=True)]
        for items, found in zip(of, advantages, strict=True)
    ]


def flat(nested: Iterable[Iterable[Advantage]]) -> list[float]:
    """One number after the other: of each sample, or of each of its tokens."""
    return [
        number
        for items in nested
        for advantage in items
        for number in (advantage if isinstance(advantage, tuple) else (advantage,))
    ]


def _tokens(item: Return, advantage: Advantage) -> list[float]:
    if not isinstance(advantage, tuple):
        return [advantage] * item.tokens
    assert len(advantage) == item.tokens
    return list(advantage)
