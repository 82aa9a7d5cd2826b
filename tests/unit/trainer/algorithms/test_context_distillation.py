"""On-policy context distillation (OPCD, arXiv 2602.12275) on numbers computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.trainer.algorithms.context_distillation import Settings
from mulligan.trainer.data import Datum
from mulligan.trainer.objectives.divergence import Divergence
from tests.support.fakes import FakeEnvironment, timeout
from tests.support.loop import Loop, in_turn, lives, refused, trained_text, whole_text

FIRST = ["go", "a", "bc"]
SECOND = ["go", "x"]


def loop(first: list[str] = FIRST, second: list[str] = SECOND, *, environment: Any = None, **more: Any) -> Loop:
    table = {"name": "context_distillation"} | more
    rollout = {"rollouts_per_task": 3, "max_restarts": 0}
    return Loop(in_turn(first, second), environment=environment, algorithm=table, rollout=rollout)


def teacher(datum: Datum) -> str:
    assert isinstance(datum.objective, Divergence) and datum.objective.beta == 1.0
    return "".join(map(chr, datum.objective.teacher.token_ids))


async def test_the_memory_teaches_all_attempts_of_later_steps() -> None:
    made = loop([*FIRST, "go", "go", "a"], [*SECOND, "x"], distillation_weight=0.5)
    experiences = await made.step()
    roles = ["first", "reflection", "second"]
    assert [[sample.role for sample in one.samples] for one in experiences] == [["first"], roles, roles]
    assert [one["reflection"].reward for one in experiences[1:]] == [1.0, 0.0]
    assert made.learner.steps == [], "the memory was empty"
    assert [entry.text for entry in made.memory.entries] == ["rule 0"], "the other helped nobody"
    experiences = await made.step(1)
    data = made.branch("taught")
    bare, known = "[system:solve]", "[system:rule 0\nanswer with a word]"
    said = [f"[user:board t0][assistant:{text}]" for text in ("go", "go", "a")]
    assert [whole_text(datum) for datum in data] == [bare + text for text in said]
    assert [teacher(datum) for datum in data] == [known + text for text in said]
    assert [datum.weight for datum in data] == pytest.approx([0.5 / 3 / len(text) for text in ("go]", "go]", "a]")])
    assert {one.memory_entry_ids for one in experiences} == {(made.memory.entries[0].reflection_id,)}


async def test_a_proven_reflection_teaches_its_own_attempt() -> None:
    made = loop(knowledge="reflection", aggregation="sequence_mean_token_sum")
    await made.step()
    (datum,) = made.branch("taught")
    assert (trained_text(datum), datum.weight) == ("a]", 1.0)
    assert teacher(datum) == "[system:rule 0\nanswer with a word][user:board t0][assistant:a]"


async def test_a_second_attempt_that_is_lost_proves_nothing() -> None:
    environment = FakeEnvironment({"t0": "go"})

    def fail(episode_id: str) -> None:
        if "-r1-second-" in episode_id or "-r0-" in episode_id:
            raise timeout()

    environment.fail = fail
    made = loop(second=["go", "go"], environment=environment, knowledge="reflection")
    experiences = await made.step()
    assert [len(one.samples) for one in experiences] == [1, 3, 3]
    (datum,) = made.branch("taught")
    assert trained_text(datum) == "bc]" and len(made.memory.entries) == 1


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(lambda: loop(knowledge="reflection"), tmp_path)
    assert first == second


def test_settings() -> None:
    settings = Settings()
    assert (settings.memory_entries, settings.beta, settings.knowledge) == (1, 1.0, "memory")
    assert loop(knowledge="reflection", beta=0.5).survive_the_wire()
    assert refused({"name": "context_distillation", "beta": -0.1})[0] == "algorithm.beta"
    assert "'memory' or 'reflection'" in refused({"name": "context_distillation", "knowledge": "memories"})[1]
