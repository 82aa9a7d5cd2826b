"""RuscaRL (arXiv 2508.16949) on numbers computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.reflections import Provenance
from mulligan.trainer.algorithms.ruscarl import Settings, shown_share, train
from mulligan.trainer.data import PolicyGradient
from mulligan.trainer.objectives.transfer import Transfer
from tests.support.fakes import FakeEnvironment, timeout
from tests.support.loop import Loop, lives, near, refused, trained_text, whole_text

HINTS = ["one", "two"]


def loop(*, environment: FakeEnvironment | None = None, steps: int = 11, size: int = 3, **more: Any) -> Loop:
    """The policy solves the task if it sees both hints."""

    def say(system: str, last: str) -> str:
        return "go" if "one\ntwo" in system else "no"

    table = {"name": "ruscarl", "hints": HINTS} | more
    rollout = {"rollouts_per_task": size, "max_restarts": 0}
    return Loop(say, environment=environment, algorithm=table, rollout=rollout, steps=steps)


async def test_hints_are_shown_to_some_and_trained_without() -> None:
    """Members see two, one and no hints. Rewards 1, 0, 0: advantages 2/√3, -1/√3, -1/√3."""
    made = loop(first_weight=3.0)
    experiences = await made.step()
    seen = [one.samples[0].system for one in experiences]
    assert seen[0] == "solve\n\nHints:\none\ntwo" and seen[2] == "solve"
    assert seen[1] in ("solve\n\nHints:\none", "solve\n\nHints:\ntwo")
    assert [one.samples[0].role for one in experiences] == ["hinted", "hinted", "first"]
    advantages = [2 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)]
    data = made.branch("transferred")
    assert [datum.objective for datum in data] == [Transfer(near(advantage), ratio=1.0) for advantage in advantages[:2]]
    assert whole_text(data[0]) == "[system:solve][user:board t0][assistant:go]" and trained_text(data[1]) == "no]"
    (bare,) = made.branch("first")
    assert isinstance(bare.objective, PolicyGradient) and bare.objective.rollout_log_probs == (-0.5,) * 3
    assert bare.objective.advantage == pytest.approx(advantages[2], abs=1e-5)
    assert [datum.weight for datum in (*data, bare)] == [1.0] * 3


async def test_a_mean_over_tokens_is_over_those_of_all_members() -> None:
    """Two of three tokens and one of five, which is that of the member without hints."""
    answers = iter(["go", "no", "none"])
    made = loop(first_weight=1.0, aggregation="token_mean")
    made.policy.answer = lambda *_: next(answers)
    await made.step()
    data = [*made.branch("transferred"), *made.branch("first")]
    assert [sum(datum.loss_mask) for datum in data] == [3, 3, 5]
    assert [datum.weight for datum in data] == pytest.approx([1 / 11] * 3)


async def test_in_the_end_nobody_sees_hints() -> None:
    made = loop()
    experiences = await made.step(10)
    assert [one.samples[0].role for one in experiences] == ["first"] * 3 and not any(one.targets for one in experiences)


@pytest.mark.parametrize(
    ("rollout", "size", "progress", "expected"),
    [
        (0, 8, 0.0, 1.0),
        (1, 8, 0.0, 6 / 7),
        (7, 8, 0.0, 0.0),
        (0, 8, 0.2, 0.5),
        (3, 8, 0.2, 2 / 7),
        (0, 8, 0.21, 1 / (1 + math.exp(1.25))),
        (0, 8, 1.0, 0.0),
        (0, 1, 0.0, 1.0),
        (0, 1, 1.0, 0.0),
    ],
)
def test_the_share_of_hints(rollout: int, size: int, progress: float, expected: float) -> None:
    assert shown_share(rollout, size, progress, Settings(hints=("h",))) == pytest.approx(expected, abs=1e-10)


def test_the_steepest_fading_is_a_number() -> None:
    settings = Settings(hints=("h",), steepness=1e9)
    assert (shown_share(0, 2, 0.0, settings), shown_share(0, 2, 1.0, settings)) == (1.0, near(0.0))


async def test_the_old_policy_is_the_learner_under_the_bare_prompt() -> None:
    made = loop(optimizer_steps=2)
    await made.step()
    (asked,) = made.learner.forwards
    assert {whole_text(datum) for datum in asked} == {
        f"[system:solve][user:board t0][assistant:{said}]" for said in ("go", "no")
    }
    for datum in made.branch("transferred"):
        assert isinstance(datum.objective, Transfer) and datum.objective.old_log_probs == (-0.25,) * 3


async def test_hints_can_come_from_the_memory() -> None:
    made = loop(hints=[], memory_entries=1, hint_prompt="{hints}\n{reminder}")
    told = Provenance("run", "e", "fake", "t0", 0, 0.0, 1.0, True)
    await made.memory.add("m", "run", "one\n\ntwo\n", told)
    experiences = await made.step()
    assert experiences[0].samples[0].system == "one\ntwo\nanswer with a word"
    assert [one.memory_entry_ids for one in experiences] == [("m",)] * 3


async def test_without_its_bare_prompt_a_hinted_attempt_is_not_trained() -> None:
    made = loop()
    experiences = await made.step()
    lost = [replace(one, targets=()) for one in experiences]
    assert [datum.branch for datum in train([lost], Settings(hints=("h",)))] == ["first"]


async def test_a_divisor_counts_what_gives_data() -> None:
    """A hinted attempt may be too long with its hints and not without, or have no tokens under the bare prompt."""
    experiences = await loop().step()
    settings = Settings(hints=("h",), first_weight=1.0)
    longer, lost, bare = experiences
    (sample,) = longer.samples
    longer = replace(longer, samples=(replace(sample, sequences=()),))
    for group, expected in (
        ([longer, lost, bare], [("first", 1 / 3), ("transferred", 1 / 3), ("transferred", 1 / 3)]),
        ([experiences[0], replace(lost, targets=()), bare], [("first", 0.5), ("transferred", 0.5)]),
    ):
        assert [(datum.branch, datum.weight) for datum in train([group], settings)] == expected


async def test_an_attempt_lost_to_the_infrastructure_is_left_out_of_the_group() -> None:
    environment = FakeEnvironment({"t0": "go"})

    def fail(episode_id: str) -> None:
        if "-r1-" in episode_id:
            raise timeout()

    environment.fail = fail
    made = loop(environment=environment)
    await made.step()
    assert [datum.objective for datum in made.branch("transferred")] == [Transfer(near(2**-0.5), ratio=1.0)]
    assert made.advantages("first") == pytest.approx([-(2**-0.5)], abs=1e-5)


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(loop, tmp_path)
    assert first == second


def test_settings() -> None:
    settings = Settings(hints=("h",))
    assert (settings.fade_at, settings.steepness, settings.normalize_by_std) == (0.2, 125.0, True)
    assert loop().survive_the_wire()
    field, message = refused({"name": "ruscarl"})
    assert field == "algorithm.hints" and "at least one, or memory_entries of at least 1" in message
    assert refused({"name": "ruscarl", "hints": HINTS, "steepness": 0})[0] == "algorithm.steepness"
