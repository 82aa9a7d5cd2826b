"""What takes its time says in a pipe, too, that it goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from types import SimpleNamespace

import pytest

from mulligan.cli.byte_line import ByteLine
from mulligan.cli.out import Heartbeat, note
from mulligan.cli.progress import EvaluationDisplay, evaluation_text, roles_in, show, step_text
from mulligan.common.errors import ServiceUnavailable
from mulligan.trainer.activity import Activity
from mulligan.trainer.client import RunInfo
from mulligan.trainer.events import Entry, EvaluationEvent, Event, StateEvent, StepEvent
from mulligan.trainer.folder import RunState
from mulligan.trainer.settings import RunSettings

SOON = 0.01  # seconds between lines
METRICS = {"seconds": 1.0, "sample_seconds": 0.5, "sampled_tokens": 8.0, "excluded": 0.0, "reflections": 0.0}


class Told:
    """What was written to stderr. `until` returns when the text is there; the test's own limit ends it otherwise."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self._capsys = capsys
        self.lines: list[str] = []

    def until(self, text: str) -> None:
        while not any(text in line for line in self._new()):
            time.sleep(SOON)

    def _new(self) -> list[str]:
        lines = self._capsys.readouterr().err.splitlines()
        self.lines += lines
        return lines


def test_a_run_in_a_pipe_says_what_it_does_while_nothing_happens(capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(capsys)
    evaluation = EvaluationEvent(0, 0.5, 0.5, 4, 0)
    numbers = count(1)

    def entry(event: Event) -> Entry:
        return Entry(next(numbers), datetime.now(UTC), event)

    async def entries() -> AsyncIterator[Entry]:
        yield entry(StateEvent(RunState.RUNNING))
        await asyncio.to_thread(
            told.until, "run lake: creating the learner, then evaluating the policy before training …"
        )
        yield entry(evaluation)
        for step in range(2):
            await asyncio.to_thread(told.until, f"run lake: working on step {step + 1}/2 … ")
            yield entry(StepEvent(step, METRICS))
        await asyncio.to_thread(told.until, "run lake: evaluating the policy after training …")
        yield entry(evaluation)
        yield entry(StateEvent(RunState.COMPLETED))

    settings = RunSettings(environment="lake", steps=2)
    run = RunInfo("lake", RunState.RUNNING, "", settings, 0, datetime.now(UTC), 0.0, "runs/lake")
    state = asyncio.run(show(run, entries(), asked(run), first=SOON, every=SOON))
    assert state == StateEvent(RunState.COMPLETED)


def asked(*runs: RunInfo) -> Callable[[], Awaitable[RunInfo]]:
    """A trainer that answers with these, and then with the last one for ever."""
    answers = list(runs)

    async def ask() -> RunInfo:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    return ask


def test_a_run_says_how_much_of_what_it_does_is_done_and_how_long_the_rest_may_take(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = Told(capsys)
    run = RunInfo(
        "lake", RunState.RUNNING, "", RunSettings(environment="lake", steps=2), 0, datetime.now(UTC), 0.0, "runs/lake"
    )
    sampling = replace(run, activity=Activity("sampling chains", 6, 24, 20.0))

    async def entries() -> AsyncIterator[Entry]:
        yield Entry(1, datetime.now(UTC), EvaluationEvent(0, 0.5, 0.5, 4, 0))
        await asyncio.to_thread(told.until, "run lake: 0/2 steps done; now sampling chains 6/24, left 0:01:00 … ")
        yield Entry(2, datetime.now(UTC), StepEvent(0, METRICS))
        of_the_run = "1/2 steps done, left 0:00:01"
        await asyncio.to_thread(told.until, f"run lake: {of_the_run}; now sampling chains 6/24, left 0:01:00 … ")

    asyncio.run(show(run, entries(), asked(sampling), first=SOON, every=SOON))


def test_a_run_that_waits_says_for_what(capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(capsys)
    run = RunInfo(
        "lake", RunState.RUNNING, "", RunSettings(environment="lake", steps=2), 0, datetime.now(UTC), 0.0, "runs/lake"
    )
    waiting = replace(run, activity=Activity("sampling chains", 6, 24, 20.0), paused="waiting for 10.0.0.7:1: gone")

    async def entries() -> AsyncIterator[Entry]:
        await asyncio.to_thread(told.until, "run lake: 0/2 steps done; paused: waiting for 10.0.0.7:1: gone … ")
        yield Entry(1, datetime.now(UTC), StateEvent(RunState.COMPLETED))

    asyncio.run(show(run, entries(), asked(waiting), first=SOON, every=SOON))


def test_a_trainer_that_does_not_answer_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(capsys)
    run = RunInfo(
        "lake", RunState.RUNNING, "", RunSettings(environment="lake", steps=2), 0, datetime.now(UTC), 0.0, "runs/lake"
    )
    answer = asked(replace(run, activity=Activity("learning")))
    calls = count()

    async def ask() -> RunInfo:
        if next(calls) < 2:
            raise ServiceUnavailable("trainer", 0.0, "gone")
        return await answer()

    async def entries() -> AsyncIterator[Entry]:
        await asyncio.to_thread(told.until, "run lake: 0/2 steps done; now learning … ")
        yield Entry(1, datetime.now(UTC), StateEvent(RunState.COMPLETED))

    asyncio.run(show(run, entries(), ask, first=SOON, every=SOON))


def test_an_evaluation_in_a_pipe_goes_on_before_its_first_attempt_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(capsys)
    with EvaluationDisplay("lake", first=SOON, every=SOON) as display:
        told.until("evaluating lake … ")
        display.update(1, 4, 0.5)
        told.until("1/4 attempts  success so far 0.50  left ")


def test_an_evaluation_says_which_protocol_plays(capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(capsys)
    with EvaluationDisplay("lake", first=SOON, every=SOON) as display:
        display.update(3, 4, 0.5, "pass_at_k")
        told.until("pass_at_k: 3/4 attempts  success so far 0.50  left ")


def test_a_step_shows_the_roles_of_its_algorithm() -> None:
    metrics = METRICS | {"success_refinement": 0.5, "success_first": 0.25, "quiz/success_hinted": 1.0}
    roles = roles_in(metrics)
    assert roles == ["first", "refinement"], "those in the run's own environment"
    text = step_text(METRICS | {"success_first": 1.0}, roles)
    assert text == "first 1.00  refinement   –   reflections 0  16 tokens/s"
    assert step_text(METRICS, []).startswith("reflections 0")
    written = METRICS | {"reflections": 3.0, "texts": 3.0}
    assert step_text(written | {"texts_reflection": 3.0}, []).startswith("reflections 3")
    assert step_text(written | {"texts_critique": 3.0}, []).startswith("texts 3")
    assert step_text(written | {"texts_critique": 1.0, "texts_reflection": 2.0}, []).startswith("texts 3")
    assert step_text(METRICS | {"reflections": 3.0}, []).startswith("reflections 3"), "of an older trainer"


def test_metrics_of_protocols_are_in_the_order_of_their_numbers() -> None:
    metrics = {"turns/gain": 0.5, "pass_at_k/pass@10": 1.0, "pass_at_k/pass@2": 0.25}
    text = evaluation_text(EvaluationEvent(5, 0.5, 0.5, 4, 0, metrics))
    assert text.splitlines() == [
        "test success after 5 steps: 0.500  (4 first attempts)",
        "  pass_at_k: pass@2 0.250  pass@10 1.000",
        "  turns: gain 0.500",
    ]


def test_a_heartbeat_counts_from_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Its first line is an hour away. After another line, `every` seconds count; after the block, it is silent."""
    told = Told(capsys)
    with Heartbeat(lambda: "goes on", first=3600.0, every=SOON) as heartbeat:
        note("something else")
        told.until("something else")
        assert not any("goes on" in line for line in told.lines)
        heartbeat.said()
        told.until("goes on … ")
        told.until("goes on … ")
    note("over")
    told.until("over")
    assert told.lines[-1] == "over"


def test_bytes_that_were_there_before_tell_nothing_about_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    said: list[str] = []
    monkeypatch.setattr("mulligan.cli.byte_line.time", SimpleNamespace(monotonic=lambda: now[0]))
    line = ByteLine("getting ready")
    monkeypatch.setattr(line, "say", said.append)
    for seconds, done in ((0, 80_000_000), (10, 85_000_000), (20, 0), (30, 50_000_000)):
        now[0] = seconds
        line.update("downloading", done, 100_000_000)
    assert [text.rpartition("left ")[2] for text in said] == ["?", "0:00:30", "?", "0:00:10"]
