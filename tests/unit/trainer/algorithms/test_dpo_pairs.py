"""Preference pairs (DPO, arXiv 2305.18290) on numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.experience_wire import experience_from_proto, experience_to_proto
from mulligan.trainer.algorithms.dpo_pairs import NEEDS, Settings, train
from mulligan.trainer.journal import journal_file, read_experiences
from mulligan.trainer.objectives.preference import Preference
from tests.support.fakes import FakeEnvironment, timeout
from tests.support.loop import Loop, in_turn, lives, refused, trained_text, whole_text

FIRST = ["a", "b", "go", "c"]
SECOND = ["go", "x", "go"]


def loop(first: list[str] = FIRST, second: list[str] = SECOND, *, environment: Any = None, **more: Any) -> Loop:
    say = in_turn(first, second, repeat("rule"))
    rollout = more.pop("rollout", {})
    return Loop(say, environment=environment, algorithm={"name": "dpo_pairs"} | more, rollout=rollout)


def pairs(made: Loop) -> list[tuple[str, str]]:
    """The whole chosen and rejected texts."""
    found = []
    for datum in made.branch("pairs"):
        assert isinstance(datum.objective, Preference)
        found.append((whole_text(datum), "".join(map(chr, datum.objective.rejected.token_ids))))
    return found


async def test_a_better_second_attempt_is_preferred_under_the_bare_prompt() -> None:
    made = loop(pair_weight=0.5)
    experiences = await made.step()
    roles = ["first", "reflection", "second"]
    assert [[sample.role for sample in one.samples] for one in experiences] == [roles, roles, ["first"], roles]
    assert [one["reflection"].reward for one in experiences if len(one.samples) > 1] == [1.0, 0.0, 1.0]
    bare = "[system:solve][user:board t0][assistant:"
    assert pairs(made) == [(f"{bare}go]", f"{bare}a]"), (f"{bare}go]", f"{bare}c]")]
    first, _ = made.branch("pairs")
    assert isinstance(first.objective, Preference) and first.weight == 0.25
    assert (first.objective.beta, first.objective.ftx, first.objective.reference_log_probs) == (0.1, 0.1, ())
    assert trained_text(first) == "go]" and sum(first.objective.rejected.loss_mask) == 2
    assert {datum.branch for step in made.learner.steps for datum in step} == {"pairs"}
    assert [entry.text for entry in made.memory.entries] == ["rule"] * 2


async def test_the_journal_has_what_was_rejected(tmp_path: Path) -> None:
    """Another member's first attempt has the same tokens, and is not meant."""
    first, _ = await lives(lambda: loop(["a", "a"], ["x", "go"], rollout={"rollouts_per_task": 2}), tmp_path)
    *_, one = read_experiences(journal_file(tmp_path, 0))
    (trained,) = one.trained
    assert trained.source_id == one.targets[0].target_id
    assert trained.others == {"rejected": one["first"].sample_id} and first[1] == replace(one, trained=())
    assert experience_from_proto(experience_to_proto(one)) == one


@pytest.mark.parametrize(("gap", "count"), [(0.0, 1), (0.25, 1), (0.5, 0)])
async def test_a_pair_needs_a_gap(gap: float, count: int) -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=2, in_parts=True)
    made = loop(["a", "a"], ["go", "a"], environment=environment, min_gap=gap, rollout={"rollouts_per_task": 1})
    await made.step()
    assert len(pairs(made)) == count and not made.memory.entries, "half of the reward solves nothing"


async def test_a_pair_with_a_lost_attempt_is_left_out() -> None:
    environment = FakeEnvironment({"t0": "go"})

    def fail(episode_id: str) -> None:
        if "-r0-first-" in episode_id or "-r1-second-" in episode_id:
            raise timeout()

    environment.fail = fail
    made = loop(["z"] * 3 + ["b", "go", "c"], ["z"] * 3 + ["go"], environment=environment)
    await made.step()
    assert [rejected[-2:] for _, rejected in pairs(made)] == ["c]"]


async def test_a_pair_that_gives_no_data_counts_in_no_divisor() -> None:
    """The policy began to rewrite earlier turns in the middle of a first attempt, which is two sequences then."""
    experiences = await loop().step()
    whole = train([experiences], Settings(pair_weight=0.5))
    torn = next(one for one in experiences if one.targets)
    first, *others = torn.samples
    twice = replace(torn, samples=(replace(first, sequences=first.sequences * 2), *others))
    left = train([[twice if one is torn else one for one in experiences]], Settings(pair_weight=0.5))
    assert [datum.weight for datum in whole] == [0.25, 0.25] and [datum.weight for datum in left] == [0.5]
    assert train([[twice]], Settings()) == []


async def test_a_step_without_pairs_trains_nothing() -> None:
    made = loop(["a"] * 4, ["b"] * 4)
    await made.step()
    assert made.learner.steps == []


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(loop, tmp_path)
    assert first == second


def test_settings() -> None:
    settings = Settings()
    assert (settings.beta, settings.ftx, settings.memory_entries) == (0.1, 0.1, 1) and {"tokenize"} == NEEDS
    assert loop(beta=0.3).survive_the_wire()
    assert refused({"name": "dpo_pairs", "beta": 0})[0] == "algorithm.beta"
    assert refused({"name": "dpo_pairs", "ftx": -1})[0] == "algorithm.ftx"
