"""Asks the services, and the run's folder, what they hold when a run has ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mulligan.common.reflections import RecordedUse
from mulligan.common.state_files import read_document
from mulligan.memory.client import MemoryClient
from mulligan.policy.client import PolicyClient
from mulligan.testing.judge.state import Final, SavedLearner, ToldEvaluation
from mulligan.trainer.client import RunClient
from mulligan.trainer.events import EvaluationEvent, EventLog, StepEvent
from mulligan.trainer.folder import RunFolder
from mulligan.trainer.journal import StepCompleted, journal_file, journaled_steps, read_experiences, read_records
from mulligan.trainer.settings import RunSettings

_USES = 1000


async def collect(
    run_id: str,
    settings: RunSettings,
    folders: tuple[Path, Path],
    clients: tuple[RunClient, PolicyClient, MemoryClient],
) -> Final:
    """`folders` are those of the trainer's runs and checkpoints."""
    runs, policy, memory = clients
    info = await runs.get(run_id)
    folder = RunFolder(folders[0] / run_id)
    steps = journaled_steps(folder.journal)
    entries = await memory.list(run_id, include_deleted=True)
    uses: dict[str, Sequence[RecordedUse]] = {}
    for entry in entries:
        uses[entry.reflection_id] = (await memory.explain(entry.reflection_id, _USES)).uses
    return Final(
        run_id=run_id,
        state=info.state,
        error=info.error,
        steps=info.step,
        chains=settings.rollout.tasks_per_step * settings.rollout.rollouts_per_task,
        experiences=[one for step in steps for one in read_experiences(journal_file(folder.journal, step))],
        completions={step: _completions(journal_file(folder.journal, step)) for step in steps},
        events=_events(folder.events_file),
        entries=entries,
        uses=uses,
        changes=await memory.changes(run_id),
        versions=await policy.versions(),
        learner=_learner(folder, folders[1] / run_id),
        evaluations=_evaluations(folder.events_file),
        threshold=settings.algorithm.success_threshold,
        readers_play=settings.algorithm.memory_readers.play,
    )


def _completions(path: Path) -> int:
    return sum(isinstance(record, StepCompleted) for record, _ in read_records(path))


def _events(path: Path) -> list[tuple[int, int | None]]:
    entries = EventLog(path).entries
    return [(one.number, one.event.step if isinstance(one.event, StepEvent) else None) for one in entries]


def _evaluations(path: Path) -> list[ToldEvaluation]:
    events = [entry.event for entry in EventLog(path).entries]
    return [
        ToldEvaluation(one.step, one.success, one.mean_reward, one.attempts, one.excluded, one.environment)
        for one in events
        if isinstance(one, EvaluationEvent)
    ]


def _learner(folder: RunFolder, checkpoints: Path) -> SavedLearner | None:
    checkpoint = folder.checkpoint()
    if checkpoint is None:
        return None
    manifest = read_document(checkpoints / checkpoint.name / "manifest.json", dict[str, Any], "")
    state = manifest["state"]
    return SavedLearner(checkpoint.name, state["next_sequence"], state["optimizer_steps"])
