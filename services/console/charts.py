"""Which metrics people watch first, and in which charts they stand together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chart:
    """`names` are the metrics that stand in it, in order. `top` is the greatest value that there can be, if there is
    one: shares end at 1."""

    title: str
    names: tuple[str, ...]
    top: float | None = None


# Title, the names of its metrics as a regular expression, the greatest value.
_FIRST: tuple[tuple[str, str, float | None], ...] = (
    ("Success on test tasks", r"(.+/)?evaluation/success", 1.0),
    ("Success in training", r"(.+/)?success_[^/]+", 1.0),
    ("Reward in training", r"(.+/)?reward_[^/]+", None),
    ("Groups with signal", r"groups_with_signal", 1.0),
    ("Left out and played again", r"excluded|restarts|dropped.*|skipped|not_finite|excluded_.+", None),
    ("Tokens", r"sampled_tokens|sequence_tokens|computed_tokens", None),
    ("Tries", r"(.+/)?tries_[^/]+", None),
    ("Difference of engine and learner (KL)", r"(.+/)?mismatch_kl", None),
    ("Entropy", r"entropy", None),
    ("Gradient norm", r"grad_norm", None),
    ("Age of samples, in steps", r"staleness_(mean|max)", None),
    ("Seconds of a step", r"(sample_|learn_|waiting_for_.+_)?seconds", None),
    ("Uplift of the memory", r"memory_uplift", None),
)


def first_charts(names: Iterable[str]) -> list[Chart]:
    """The charts that have a metric."""
    known = sorted(names)
    found = []
    for title, pattern, top in _FIRST:
        matching = tuple(name for name in known if re.fullmatch(pattern, name))
        if matching:
            found.append(Chart(title, matching, top))
    return found


def matching_charts(names: Iterable[str], text: str) -> list[Chart]:
    """A chart for each metric whose name has all words of the text."""
    words = text.lower().split()
    return [Chart(name, (name,)) for name in sorted(names) if all(word in name.lower() for word in words)]
