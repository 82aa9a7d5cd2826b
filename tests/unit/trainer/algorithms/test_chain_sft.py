"""Chains from a mistake to its repair (LEMMA, arXiv 2503.17439) on numbers computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.trainer.algorithms.chain_sft import NEEDS, Settings
from mulligan.trainer.data import Distillation, ModelLimits
from tests.support.fakes import FakeEnvironment, timeout
from tests.support.loop import Loop, in_turn, lives, refused, trained_text, whole_text


def loop(
    first: list[str] = ["go", "a", "b"],  # noqa: B006 - not changed
    second: list[str] = ["go", "c"],  # noqa: B006 - not changed
    *,
    environment: FakeEnvironment | None = None,
    rewrites: bool = False,
    rollout: Any = None,
    **settings: Any,
) -> Loop:
    return Loop(
        in_turn(first, second),
        environment=environment,
        rewrites=rewrites,
        algorithm={"name": "chain_sft", **settings},
        rollout={"rollouts_per_task": 3, "temperature": 0.9, **(rollout or {})},
    )


@pytest.mark.parametrize("trains_reflection", [True, False])
async def test_one_step(trains_reflection: bool) -> None:
    """Of three attempts one succeeds at once, one is corrected, and one is not."""
    made = loop(chain_weight=0.5, train_reflection=trains_reflection)
    solved, corrected, failed = await made.step()
    assert [sample.role for sample in solved.samples] == ["first"]
    for one in (corrected, failed):
        first, reflection, second = one.samples
        assert [sample.role for sample in one.samples] == ["first", "reflection", "second"]
        assert (reflection.parent_id, second.parent_id) == (first.sample_id, reflection.sample_id)
        assert reflection.reward == second.reward
    assert [len(one.targets) for one in (solved, corrected, failed)] == [0, 1, 0]
    (target,) = corrected.targets
    assert (target.role, target.source_id) == ("chain", corrected["second"].sample_id)
    (datum,) = made.learner.steps[0]
    assert (datum.branch, datum.objective, datum.weight, datum.temperature) == (
        "chain",
        Distillation(1.0),
        0.5 / 3,
        0.9,
    )
    assert whole_text(datum) == (
        "[system:solve][user:board t0][assistant:a][user:wrong\nWhat went wrong?][assistant:rule 0]"
        "[user:board t0][assistant:go]"
    )
    assert trained_text(datum) == ("rule 0]go]" if trains_reflection else "go]"), "the mistake carries no loss"


async def test_the_joints_are_settings() -> None:
    made = loop(ask="said: {feedback}", again="again: {observation}")
    await made.step()
    (datum,) = made.branch("chain")
    assert "[user:said: wrong]" in whole_text(datum) and "[user:again: board t0]" in whole_text(datum)


async def test_all_turns_of_an_attempt_are_in_the_chain() -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=2)
    made = loop(["a", "b"], ["c", "go"], environment=environment, rollout={"rollouts_per_task": 1})
    await made.step()
    (datum,) = made.branch("chain")
    assert "[assistant:a][user:after a][assistant:b][user:wrong\n" in whole_text(datum)
    assert trained_text(datum) == "rule 0]c]go]"


@pytest.mark.parametrize("trains_cut", [False, True])
async def test_a_cut_reflection_ends_the_chain_unless_it_is_wanted(trains_cut: bool) -> None:
    rollout = {"reflection_max_tokens": 3}
    made = loop(rollout=rollout, train_cut_reflections=trains_cut)
    experiences = await made.step()
    assert [len(one.samples) for one in experiences] == ([1, 3, 3] if trains_cut else [1, 2, 2])
    assert [trained_text(datum) for datum in made.branch("chain")] == (["rulgo]"] if trains_cut else [])


@pytest.mark.parametrize("role", ["first", "second"])
async def test_what_is_lost_to_the_infrastructure_makes_no_chain(role: str) -> None:
    environment = FakeEnvironment({"t0": "go"})

    def fail(episode_id: str) -> None:
        if f"-r1-{role}" in episode_id:
            raise timeout()

    environment.fail = fail
    made = loop(["go", "a", "a", "a", "b"], ["go"] * 9, environment=environment)
    experiences = await made.step()
    assert [len(one.targets) for one in experiences] == [0, 0, 1]
    assert [datum.weight for datum in made.branch("chain")] == [1 / 2 if role == "first" else 1 / 3]


async def test_a_chain_that_cannot_be_trained_on_is_counted() -> None:
    made = loop()
    made.learner.limits = ModelLimits(2**16, 117)
    await made.step()
    assert made.metrics["dropped_too_long"] == 1 and made.branch("chain") == []
    rewriting = loop(rewrites=True)
    await rewriting.step()
    assert rewriting.metrics["dropped_rewritten_history"] == 1, "such a run is refused at its start"


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(loop, tmp_path)
    assert first == second


def test_settings() -> None:
    assert "tokenize" in NEEDS and "own_reflections" in NEEDS
    assert Settings().train_reflection and loop(ask="{feedback}?").survive_the_wire()
    assert refused({"name": "chain_sft", "chain_weight": -1})[0] == "algorithm.chain_weight"
    field, message = refused({"name": "chain_sft", "train_reflections": True})
    assert field == "algorithm.train_reflections" and "did you mean 'train_reflection'?" in message
