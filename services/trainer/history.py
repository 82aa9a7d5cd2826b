"""What a run sampled and earned in each step, in short: what its sampler chooses by.

`history.jsonl` in the run's folder has a line per step. It says nothing that the journal does not say, but is read much
faster. Where a line is missing or damaged, the step's journal is read. A later line of the same step replaces an
earlier one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from mulligan.common.experience import Experience
from mulligan.common.state_files import LineLog
from mulligan.trainer.folder import RunFolder
from mulligan.trainer.journal import GroupsReplaced, StepStarted, journal_file, read_experiences, read_records, slot_of
from mulligan.trainer.samplers import Group, History, Round
from mulligan.trainer.trainable import with_usable_reward


class _Line(msgspec.Struct, frozen=True):
    step: int
    rounds: list[Round]


def read_history(folder: RunFolder, environment: str, before: int) -> History:
    """The rounds of all steps before this one. `environment` is the run's own. Lines that were missing are written.

    Raises DomainError DISK_FULL, or OSError without the folder.
    """
    lines = LineLog(folder.history_file, _Line)
    known = {line.step: line.rounds for line in lines.read()[0]}
    missing = []
    history = History()
    for step in range(before):
        rounds = known.get(step)
        if rounds is None:
            path = journal_file(folder.journal, step)
            rounds = read_rounds(path, environment) if path.exists() else []
            missing.append(_Line(step, rounds))
        for one in rounds:
            history.add(one)
    lines.append(missing)
    return history


def write_history(folder: RunFolder, step: int, rounds: Sequence[Round]) -> None:
    """Raises DomainError DISK_FULL, or OSError without the folder."""
    LineLog(folder.history_file, _Line).append([_Line(step, list(rounds))])


def read_rounds(path: Path, environment: str) -> list[Round]:
    """The rounds of one step, from its journal."""
    records = [record for record, _ in read_records(path) if isinstance(record, StepStarted | GroupsReplaced)]
    return rounds_of(records, read_experiences(path), environment)


def rounds_of(
    records: Iterable[StepStarted | GroupsReplaced], experiences: Iterable[Experience], environment: str
) -> list[Round]:
    """The rounds of one step, from its records in the journal, in order, and from its experiences."""
    rewards: defaultdict[int, dict[int, float | None]] = defaultdict(dict)  # by slot and rollout
    for experience in experiences:
        rewards[slot_of(experience.experience_id)][experience.rollout] = first_reward(experience)
    rounds = []
    first = 0
    for number, record in enumerate(records):
        names = record.environments or [environment] * len(record.task_ids)
        groups = []
        for slot, (name, task_id) in enumerate(zip(names, record.task_ids, strict=True), first):
            groups.append(Group(name, task_id, tuple(reward for _, reward in sorted(rewards[slot].items()))))
        rounds.append(Round(record.step, number, tuple(groups), record.horizon))
        first += len(groups)
    return rounds


def first_reward(experience: Experience) -> float | None:
    """Of its first sample."""
    first = experience.samples[0] if experience.samples else None
    if first is None:
        return None
    return with_usable_reward(first).reward if first.is_episode else first.reward
