"""SDPO (arXiv 2601.20802) on numbers computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.trainer.algorithms.sdpo import Settings
from mulligan.trainer.data import Datum
from mulligan.trainer.objectives.divergence import Divergence
from tests.support.fakes import FakeEnvironment, timeout
from tests.support.loop import Loop, lives, refused, trained_text, whole_text

SOLUTION = "solve\n\nCorrect solution:\n\nboard t0>GO;after go"
FEEDBACK = "\n\nThe following is feedback from your unsuccessful earlier attempt:\n\nwrong"
END = "\n\nCorrectly solve the original task."


def loop(said: list[str], *, environment: FakeEnvironment | None = None, concurrency: int = 1, **more: Any) -> Loop:
    answers = iter(said)
    rollout = {"rollouts_per_task": len(said), "concurrency": concurrency, "max_restarts": 0}
    table = {"name": "sdpo"} | more
    return Loop(lambda system, last: next(answers), environment=environment, algorithm=table, rollout=rollout)


def teacher(datum: Datum) -> str:
    assert isinstance(datum.objective, Divergence)
    return "".join(map(chr, datum.objective.teacher.token_ids))


@pytest.mark.parametrize("concurrency", [1, 8])
async def test_a_success_teaches_the_others(concurrency: int) -> None:
    made = loop(["a", "go", "bcd"], concurrency=concurrency, distillation_weight=3.0)
    experiences = await made.step()
    assert [[sample.role for sample in one.samples] for one in experiences] == [["first"]] * 3
    assert [bool(one.targets) for one in experiences] == [True, False, True], "it has nobody to learn from"
    data = made.branch("taught")
    assert [whole_text(datum) for datum in data] == [
        f"[system:solve][user:board t0][assistant:{said}]" for said in ("a", "bcd")
    ]
    assert [teacher(datum) for datum in data] == [
        f"[system:{SOLUTION}{END}][user:board t0][assistant:{said}]" for said in ("a", "bcd")
    ]
    assert [datum.datum_id for datum in data] == [experiences[place]["first"].sample_id for place in (0, 2)]
    assert all(isinstance(datum.objective, Divergence) and datum.objective.beta == 1.0 for datum in data)
    assert [datum.weight for datum in data] == pytest.approx([3.0 / 6] * 2), "a mean over the six tokens"
    assert not made.branch("first"), "there is no policy gradient"


async def test_of_two_successes_each_teaches_the_other() -> None:
    made = loop(["go", "go"])
    await made.step()
    assert [teacher(datum)[: len(SOLUTION) + 8] for datum in made.branch("taught")] == [f"[system:{SOLUTION}"] * 2


async def test_without_a_success_the_feedback_teaches() -> None:
    made = loop(["a", "b"])
    await made.step()
    expected = [f"[system:solve{FEEDBACK}{END}][user:board t0][assistant:{said}]" for said in "ab"]
    assert [teacher(datum) for datum in made.branch("taught")] == expected


async def test_feedback_can_stand_beside_a_solution() -> None:
    made = loop(["a", "go"], feedback_with_solution=True)
    await made.step()
    assert [teacher(datum) for datum in made.branch("taught")] == [
        f"[system:{SOLUTION}{FEEDBACK}{END}][user:board t0][assistant:a]"
    ]


async def test_the_teachers_prompt_is_a_setting() -> None:
    texts: Any = {"teacher_prompt": "{solution}{feedback}{solver}", "solution_text": "{trace}! ", "feedback_text": "-"}
    made = loop(["a", "go"], **texts)
    await made.step()
    (datum,) = made.branch("taught")
    assert teacher(datum).startswith("[system:board t0>GO;after go! solve]")


async def test_a_policy_gradient_can_be_added() -> None:
    made = loop(["a", "go"], first_weight=0.5, aggregation="sequence_mean_token_sum", beta=0.5)
    await made.step()
    assert made.advantages("first") == pytest.approx([-(2**-0.5), 2**-0.5], abs=1e-5)
    assert [datum.weight for datum in made.branch("first")] == [0.25, 0.25]
    (taught,) = made.branch("taught")
    assert (taught.weight, trained_text(taught)) == (1.0, "a]")
    assert isinstance(taught.objective, Divergence) and taught.objective.beta == 0.5


async def test_what_is_lost_to_the_infrastructure_neither_teaches_nor_learns() -> None:
    environment = FakeEnvironment({"t0": "go"})

    def fail(episode_id: str) -> None:
        if "-r1-" in episode_id:
            raise timeout()

    environment.fail = fail
    made = loop(["a", "go", "b"], environment=environment)
    await made.step()
    data = made.branch("taught")
    assert [trained_text(datum) for datum in data] == ["a]", "b]"]
    assert all("feedback" in teacher(datum) and "solution" not in teacher(datum) for datum in data)


async def test_a_teacher_that_does_not_fit_teaches_nothing() -> None:
    made = loop(["a", "b"], teacher_prompt="{feedback}" + "x" * 4096)
    await made.step()
    assert made.learner.steps == [] and made.metrics["dropped_too_long"] == 2


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(lambda: loop(["a", "go", "b"]), tmp_path)
    assert first == second


def test_settings() -> None:
    assert Settings().beta == 1.0 and Settings().first_weight == 0.0
    assert loop(["a"], beta=0.25, solution_text="{trace}").survive_the_wire()
    assert refused({"name": "sdpo", "beta": 1.5})[0] == "algorithm.beta"
    assert refused({"name": "sdpo", "distillation_weight": -1})[0] == "algorithm.distillation_weight"
