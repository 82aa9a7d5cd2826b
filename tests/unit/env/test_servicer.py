"""What the servicer tells of environments that say less than they should."""

from __future__ import annotations

from mulligan.common.types import EnvironmentInfo, Split
from mulligan.env.prompts import generic_prompts
from mulligan.env.servicer import _info


def test_a_split_without_a_count_has_no_tasks() -> None:
    """One environment that leaves a split out must not keep all others from being listed."""
    prompts = generic_prompts("Say hello.", "Any text.")
    told = _info("greetings", EnvironmentInfo("greetings", "", prompts, 1, 1.0, True, {Split.TRAIN: 3}))
    assert (told.train_task_count, told.test_task_count) == (3, 0)
