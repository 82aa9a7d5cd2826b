"""Optimizer steps that are skipped as not finite: the step's event stays, and people are told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mulligan.console.library import Library
from mulligan.console.report import report
from mulligan.trainer.events import EvaluationEvent, EventLog, StepEvent
from mulligan.trainer.metrics import mean_metrics
from mulligan.trainer.run_metrics import _COUNTS, step_ended
from tests.unit.trainer.test_run import STEPS, World, notices

BAD = {1: math.inf, 3: math.nan}  # the norm of the gradient, by optimizer step


@pytest.fixture
async def world(tmp_path: Path) -> World:
    """A run of one optimizer step each, of which some are skipped."""
    world = World(tmp_path)
    step = world.learner.optim_step

    async def optim_step() -> dict[str, float]:
        number = world.learner.state
        metrics = await step()
        return metrics | ({"grad_norm": BAD[number], "skipped": 1.0, "not_finite": 1.0} if number in BAD else {})

    world.learner.optim_step = optim_step  # type: ignore[method-assign]
    await world.run().train()
    return world


async def test_the_event_of_a_skipped_step_is_read_again(world: World) -> None:
    log = EventLog(world.folder.events_file)
    assert log.damage == [] and sorted(log.steps()) == list(range(STEPS))
    norms = [log.steps()[step].metrics["grad_norm"] for step in range(STEPS)]
    assert [math.isfinite(norm) for norm in norms] == [True, False, True, False, True]
    summary = json.loads((world.folder.path / "summary.json").read_text())
    assert world.run().summary()["rollouts"] == summary["rollouts"], "with those of the skipped steps"


async def test_skipped_steps_are_counted_and_told_once(world: World) -> None:
    steps = world.run().events.steps()
    assert [steps[step].metrics["not_finite"] for step in range(STEPS)] == [0, 1, 0, 1, 0]
    assert json.loads((world.folder.path / "summary.json").read_text())["not_finite"] == 2
    assert sum("not_finite" in text for text in notices(world.run())) == 1
    before = _COUNTS["not_finite"]._value.get()
    step_ended(steps[1].metrics)
    assert _COUNTS["not_finite"]._value.get() == before + 1


async def test_a_lost_event_comes_back_from_the_journal(world: World) -> None:
    file = world.folder.events_file
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if '"step":1' not in line))
    assert 1 not in EventLog(file).steps()
    run = world.run()
    await run.train()
    assert run.events.steps()[1].metrics["grad_norm"] == math.inf, "the journal knows which it was"
    assert EventLog(file).steps()[1].metrics["not_finite"] == 1


async def test_charts_have_a_gap(world: World) -> None:
    """Of JSON, which browsers do not read with the numbers that Python's writes."""
    library = Library(world.folder.path.parent)
    library.update()
    (shown,) = library.runs
    steps, values = shown.series.series["grad_norm"].after(0)
    assert steps == list(range(STEPS)) and values == [1.0, None, 1.0, None, 1.0]
    assert "[1.0,null,1.0,null,1.0]" in report(shown, 0, tokens=False)


def test_an_evaluation_is_read_again(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.add(EvaluationEvent(0, 0.5, 0.5, 8, 0, {"of/ratio": math.inf, "of/mean": 0.25}))
    log.add(StepEvent(0, {"loss": -math.inf}))
    read = EventLog(tmp_path / "events.jsonl")
    assert read.damage == []
    metrics = read.evaluations()[0].metrics
    assert metrics["of/mean"] == 0.25 and math.isnan(metrics["of/ratio"])
    assert math.isnan(read.steps()[0].metrics["loss"])


def test_the_mean_of_both_infinities() -> None:
    metrics = mean_metrics([{"loss": math.inf, "entropy": 1.0}, {"loss": -math.inf, "entropy": 2.0}])
    assert math.isnan(metrics["loss"]) and metrics["entropy"] == 1.5
