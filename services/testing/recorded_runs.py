"""Folders of runs as a trainer writes them, without training: for tests and benchmarks of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mulligan.common.experience import Experience, Sample, Segment, SegmentKind, TokenSequence, Trained, Turn
from mulligan.common.inference import VersionSpan
from mulligan.common.types import Outcome
from mulligan.trainer.events import EvaluationEvent, Event, EventLog, StateEvent, StepEvent
from mulligan.trainer.folder import RunFolder, RunState
from mulligan.trainer.journal import StepJournal, StepStarted
from mulligan.trainer.settings import RunSettings

SETTINGS = {"environment": "frozenlake-3x3", "steps": 3, "model": {"source": "embedded"}}
BOARD = "A\tD\tD\nD\tC\tD\nD\tD\tB"


def sample(
    role: str, name: str, reward: float | None, *, text: str = "", answer: str = "Up", parent: str = ""
) -> Sample:
    """An episode of one turn, or a text."""
    sampled = Segment(SegmentKind.SAMPLED, (5, 6), (-0.1, -2.0), (VersionSpan(3, 2),))
    return Sample(
        sample_id=f"{name}-{role}",
        role=role,
        outcome=Outcome.COMPLETED,
        sequences=(TokenSequence((Segment(SegmentKind.PROMPT, (1, 2, 3)), sampled)),),
        temperature=1.0,
        reward=reward,
        parent_id=parent,
        system="play",
        turns=(Turn(BOARD if not text else "reflect", answer, answer, reward or 0.0),),
        text=text,
        episode_id="" if text else f"{name}-{role}",
        feedback="" if text else "fell into hole",
        final_observation="" if text else BOARD,
    )


def experience(
    run: str, step: int, slot: int, rollout: int, *, reward: float = 0.0, says: str = "a legend"
) -> Experience:
    """A first attempt; where it fails also a reflection and a second attempt that succeeds."""
    name = f"{run}-s{step}-t{slot}-r{rollout}"
    first = sample("first", name, reward)
    samples = [first]
    if reward < 1:
        reflection = sample("reflection", name, 1.0, text=says, parent=first.sample_id)
        samples += [reflection, sample("second", name, 1.0, parent=reflection.sample_id)]
    return Experience(name, run, step, "frozenlake-3x3", f"train/{slot:05}", rollout, tuple(samples))


def write_run(
    root: Path, run: str, *, steps: int = 3, groups: int = 2, rollouts: int = 2, says: str = "a legend"
) -> RunFolder:
    """A completed run. In each group all rollouts but the first fail at first."""
    folder = RunFolder(root / run)
    folder.create(run, RunSettings.model_validate(SETTINGS))
    events: list[Event] = [StateEvent(RunState.RUNNING), EvaluationEvent(0, 0.3, 0.3, 100, 0)]
    for step in range(steps):
        write_step(folder, run, step, groups=groups, rollouts=rollouts, says=says)
        metrics = {
            "success_first": (step + 1) / steps,
            "success_second": 0.9,
            "entropy": 1 / (step + 1),
            "seconds": 2.0,
        }
        events.append(StepEvent(step, metrics))
    write_events(folder, [*events, EvaluationEvent(steps, 0.8, 0.8, 100, 0), StateEvent(RunState.COMPLETED)])
    folder.write_record(folder.record().now(RunState.COMPLETED))
    return folder


def write_events(folder: RunFolder, events: Sequence[Event]) -> None:
    log = EventLog(folder.events_file)
    for event in events:
        log.add(event)


def write_step(folder: RunFolder, run: str, step: int, *, groups: int, rollouts: int, says: str) -> None:
    journal = StepJournal(folder.journal, step)
    journal.start(StepStarted(step, [f"train/{slot:05}" for slot in range(groups)], 0, 3))
    data: list[Trained] = []
    for slot in range(groups):
        for rollout in range(rollouts):
            one = experience(run, step, slot, rollout, reward=float(rollout == 0), says=says)
            for sampled in one.samples:
                journal.add(sampled)
            journal.complete(one)
            source = one.samples[0].sample_id
            data.append(Trained(source, source, 0, "first", "policy_gradient", 0.5, numbers={"advantage": 0.25}))
    journal.train(data)
    journal.close()
