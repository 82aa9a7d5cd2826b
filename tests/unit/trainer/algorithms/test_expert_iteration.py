"""ReST (arXiv 2308.08998) and ReST-EM (arXiv 2312.06585) on numbers computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.trainer.algorithms.expert_iteration import Filter, Settings
from mulligan.trainer.data import Distillation, ModelLimits
from tests.support.fakes import FakeEnvironment, timeout
from tests.support.loop import Loop, lives, refused, trained_text, whole_text

# Two answers each: rewards 1, 1/2, 0, 1.
SAID = ["go", "go", "go", "a", "b", "c", "go", "go"]


def loop(said: list[str] = SAID, *, turns: int = 2, **settings: Any) -> Loop:
    answers = iter(said)
    environment = FakeEnvironment({"t0": "go"}, turns=turns, in_parts=True)
    algorithm = {"name": "expert_iteration", **settings}
    return Loop(lambda system, last: next(answers), environment=environment, algorithm=algorithm)


def kept(made: Loop) -> list[str]:
    return [datum.datum_id for datum in made.branch("first")]


async def test_rest_em_imitates_what_solves_the_task() -> None:
    made = loop(first_weight=0.5)
    experiences = await made.step()
    assert [one["first"].reward for one in experiences] == [1.0, 0.5, 0.0, 1.0]
    assert kept(made) == ["run-s0-t0-r0-first", "run-s0-t0-r3-first"]
    for datum in made.branch("first"):
        assert datum.objective == Distillation(1.0) and datum.weight == 0.5 / 4 and datum.temperature == 0.7
        assert whole_text(datum) == "[system:solve][user:board t0][assistant:go][user:after go][assistant:go]"
        assert trained_text(datum) == "go]go]"
    assert not any(one.targets for one in experiences)


@pytest.mark.parametrize(("said", "signal"), [(["go"] * 4, 1.0), (["a"] * 4, 0.0)])
async def test_whatever_passes_teaches(said: list[str], signal: float) -> None:
    made = loop(said, turns=1)
    await made.step()
    assert made.metrics["groups_with_signal"] == signal


async def test_at_most_so_many_of_a_task() -> None:
    made = loop(per_task=1)
    await made.step(tasks=("t0",))
    assert kept(made) == ["run-s0-t0-r0-first"] and made.branch("first")[0].weight == 1 / 4
    unlimited = loop(["go"] * 24, turns=1, per_task=0)
    await unlimited.step(tasks=("t0", "t0", "t0"))
    assert len(kept(unlimited)) == 12


@pytest.mark.parametrize(("step", "rollouts"), [(0, [0, 1, 3]), (1, [0, 3]), (2, []), (3, [0, 1, 3])])
async def test_the_thresholds_of_rest_rise_and_begin_anew(step: int, rollouts: list[int]) -> None:
    """A reward has to exceed 0, then 1/2, then 1."""
    made = loop(filter="rest", thresholds=[0.0, 0.5, 1.0])
    await made.step(step)
    assert kept(made) == [f"run-s{step}-t0-r{rollout}-first" for rollout in rollouts]


async def test_what_is_lost_or_refused_is_not_imitated() -> None:
    """Three attempts have a reward. The first of them is right and too long for the learner, the second is right."""
    made = loop(["lost"] * 3 + ["GOOO", "go", "a"], turns=1, success_threshold=0.0)

    def fail(episode_id: str) -> None:
        if "-r0-" in episode_id:
            raise timeout()

    made.environment.fail = fail
    shortest = len("[system:solve][user:board t0][assistant:go]")
    made.learner.limits = ModelLimits(2**16, shortest)
    await made.step()
    assert made.metrics["excluded"] == 1 and made.metrics["dropped_too_long"] == 1
    assert kept(made) == ["run-s0-t0-r2-first", "run-s0-t0-r3-first"]
    assert [datum.weight for datum in made.branch("first")] == [1 / 3] * 2


async def test_a_step_in_which_nothing_passes_has_no_data() -> None:
    made = loop(["a"] * 8)
    await made.step()
    assert made.learner.steps == [] and made.learner.state == 0


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(loop, tmp_path)
    assert first == second


def test_defaults_are_the_papers() -> None:
    settings = Settings()
    assert (settings.filter, settings.per_task) == (Filter.REST_EM, 10)
    assert settings.thresholds == (0.0, 0.7, 0.8, 0.9, 0.95, 0.99)
    assert loop(filter="rest", thresholds=[0.25, 0.5]).survive_the_wire()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"filter": "rest-em"}, "'rest' or 'rest_em'"),
        ({"thresholds": [0.5, 0.5]}, "expected rising numbers; got [0.5, 0.5]"),
        ({"thresholds": []}, "at least 1 item"),
        ({"per_task": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], words: str) -> None:
    field, message = refused({"name": "expert_iteration", **changes})
    assert field == f"algorithm.{next(iter(changes))}" and words in message
