"""How often a learner added its gradients: the judge follows it with a model, over calls that are repeated and lost."""

from __future__ import annotations

import base64
import json
from functools import partial
from typing import Any

from mulligan.testing.judge.gradients import check
from mulligan.testing.judge.history import BrokenRule, RecordedCall, numbered
from tests.support.made_history import Summing


class Calls:
    """Calls of a learner, one after the other."""

    def __init__(self) -> None:
        self.made: list[RecordedCall] = []

    def call(self, call: str, answer: Any = None, code: str = "", **request: Any) -> None:
        asked = {"learner_id": "run"} | request
        whole = base64.b64encode(json.dumps(asked).encode()).decode()
        start = float(len(self.made))
        method = f"/mulligan.trainer.v1.LearnerService/{call}"
        told = {"answer": answer, "code": code or ("" if answer is not None else "UNAVAILABLE")}
        self.made.append(RecordedCall(0, "trainer", "", method, asked, "", start, start + 1, whole=whole, **told))

    def create(self) -> None:
        self.call("CreateLearner", {"next_sequence": 1})

    def add(self, sequence: int, gradient: int, loss: float | None) -> None:
        answer = {"metrics": {"loss": loss}} if loss is not None else None
        self.call("ForwardBackward", answer, sequence=sequence, gradient=gradient)

    def step(self, sequence: int, norm: float | None) -> None:
        answer = {"metrics": {"grad_norm": norm, "skipped": 0.0}} if norm is not None else None
        self.call("OptimStep", answer, sequence=sequence)

    @property
    def verdict(self) -> list[BrokenRule]:
        return list(check(numbered(self.made), partial(Summing, {})))


def test_a_repeated_call_counts_once() -> None:
    calls = Calls()
    calls.create()
    calls.create()
    for loss in (None, 2.0, 2.0):
        calls.add(1, 4, loss)
    for norm in (None, 4.0, 4.0):
        calls.step(2, norm)
    calls.add(3, 2, 5.0)
    assert calls.verdict == []


def test_a_gradient_that_is_added_twice_is_told_once() -> None:
    calls = Calls()
    calls.create()
    for loss in (None, 2.0):
        calls.add(1, 4, loss)
    calls.step(2, 8.0)
    calls.add(3, 2, 9.0)
    (violation,) = calls.verdict
    assert "grad_norm 8.0 (not 4)" in violation.text and violation.calls[0].name == "OptimStep"


def test_gradients_that_are_lost_are_told() -> None:
    """Two calls for one step, of which the first was forgotten."""
    calls = Calls()
    calls.create()
    calls.add(1, 4, 2.0)
    calls.add(2, 2, 1.0)
    calls.step(3, 2.0)
    (violation,) = calls.verdict
    assert "grad_norm 2.0 (not 6)" in violation.text


def test_it_follows_a_learner_from_its_checkpoint() -> None:
    calls = Calls()
    calls.create()
    calls.call("SaveCheckpoint", {}, name="run-0")
    calls.add(1, 4, 2.0)
    calls.step(2, 4.0)
    calls.call("SaveCheckpoint", name="run-1")
    calls.call("SaveCheckpoint", {}, name="run-1")
    calls.add(3, 6, 7.0)
    calls.create()  # the learner was lost
    calls.call("LoadCheckpoint", {"next_sequence": 3, "optimizer_steps": 1}, name="run-1")
    calls.add(3, 6, 7.0)
    calls.step(4, 6.0)
    assert calls.verdict == []
    calls.add(5, 2, 5.0)  # of the weights before that step
    assert len(calls.verdict) == 1


def test_a_checkpoint_that_may_have_been_written_or_not_is_not_guessed() -> None:
    """Two saves with the same number of calls, of other weights; the second was lost with its answer, or was not."""
    calls = Calls()
    calls.create()
    calls.add(1, 4, 2.0)
    calls.step(2, 4.0)
    calls.call("SaveCheckpoint", {}, name="run-1")
    calls.create()
    calls.add(1, 6, 3.0)
    calls.step(2, 6.0)
    calls.call("SaveCheckpoint", name="run-1")
    calls.create()
    calls.call("LoadCheckpoint", {"next_sequence": 3, "optimizer_steps": 1}, name="run-1")
    for weight in (4, 6):
        calls.add(3, 2, weight + 1.0)
        assert calls.verdict == []
    calls.create()
    calls.add(1, 4, 9.0)
    assert len(calls.verdict) == 1, "a new learner is known again"
