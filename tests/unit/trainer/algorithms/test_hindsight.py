"""Attempts under words of praise or blame (Chain of Hindsight, arXiv 2302.02676) on numbers computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.algorithms.hindsight import Settings
from mulligan.trainer.data import Distillation, ModelLimits
from tests.support.fakes import FakeEnvironment, timeout
from tests.support.loop import Loop, lives, refused, trained_text, whole_text


def loop(said: list[str] = ["go", "a", "b", "go"], *, rewrites: bool = False, turns: int = 1, **settings: Any) -> Loop:  # noqa: B006
    answers = iter(said)
    return Loop(
        lambda system, last: next(answers),
        environment=FakeEnvironment({"t0": "go"}, turns=turns),
        rewrites=rewrites,
        algorithm={"name": "hindsight", "bad": "{solver} badly", **settings},
    )


async def test_one_step() -> None:
    made = loop(good_weight=0.5, bad_weight=0.25)
    experiences = await made.step()
    assert [[sample.role for sample in one.samples] for one in experiences] == [["first"]] * 4
    good, bad = made.branch("good"), made.branch("bad")
    assert [datum.datum_id for datum in good] == ["run-s0-t0-r0-first", "run-s0-t0-r3-first"]
    assert [datum.datum_id for datum in bad] == ["run-s0-t0-r1-bad", "run-s0-t0-r2-bad"]
    assert [datum.weight for datum in (*good, *bad)] == [0.5 / 4, 0.5 / 4, 0.25 / 4, 0.25 / 4]
    assert {datum.objective for datum in (*good, *bad)} == {Distillation(1.0)}
    assert {datum.temperature for datum in (*good, *bad)} == {0.7}
    assert whole_text(good[0]) == "[system:solve][user:board t0][assistant:go]"
    assert whole_text(bad[0]) == "[system:solve badly][user:board t0][assistant:a]"
    assert [trained_text(datum) for datum in (*good, *bad)] == ["go]", "go]", "a]", "b]"], "the words carry no loss"
    (target,) = experiences[1].targets
    assert (target.source_id, target.system) == (experiences[1]["first"].sample_id, "solve badly")


@pytest.mark.parametrize("rewrites", [False, True])
async def test_every_turn_of_an_attempt_is_learned(rewrites: bool) -> None:
    made = loop(["a", "b"] + ["x", "go"] * 3, turns=2, rewrites=rewrites)
    await made.step()
    assert [trained_text(datum) for datum in made.branch("bad")] == (["a]", "b]"] if rewrites else ["a]b]"])
    assert all(whole_text(datum).startswith("[system:solve badly]") for datum in made.branch("bad"))


async def test_what_is_lost_to_the_infrastructure_is_neither_good_nor_bad() -> None:
    made = loop(["lost"] * 3 + ["go", "a", "b"])

    def fail(episode_id: str) -> None:
        if "-r0-" in episode_id:
            raise timeout()

    made.environment.fail = fail
    await made.step()
    assert made.metrics["excluded"] == 1
    assert [datum.weight for datum in (*made.branch("good"), *made.branch("bad"))] == [1 / 3] * 3


async def test_what_cannot_be_trained_on_is_counted() -> None:
    made = loop()
    made.learner.limits = ModelLimits(2**16, len("[system:solve][user:board t0][assistant:go]"))
    await made.step()
    assert made.metrics["dropped_too_long"] == 2 and len(made.branch("good")) == 2 and made.branch("bad") == []


async def test_bad_attempts_without_the_tokens_of_their_prompt_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = loop()

    async def refuse(prompt: Any, options: Any = None) -> tuple[int, ...]:
        raise DomainError(Reason.UNSUPPORTED_OPTION, "no tokens")

    monkeypatch.setattr(made.policy, "tokenize", refuse)
    await made.step()
    assert made.metrics["dropped_no_prompt"] == 2 and len(made.branch("good")) == 2 and made.branch("bad") == []


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(loop, tmp_path)
    assert first == second


def test_settings() -> None:
    assert (Settings().good_weight, Settings().bad_weight) == (1.0, 1.0)
    assert loop().survive_the_wire()
    field, message = refused({"name": "hindsight", "bad_weight": -1})
    assert field == "algorithm.bad_weight" and "greater than or equal to 0" in message
