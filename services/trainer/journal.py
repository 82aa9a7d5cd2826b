"""The journal of a run: every sampled attempt and reflection, on disk before it is used.

Each training step has one append-only file, such as `journal/000012.msgpack`: a msgpack stream of `[crc32, payload]`
pairs. A payload is the msgpack of one record with a `type`. Any msgpack library reads them; `mulligan experiences`
prints them. Opening a file drops a last record that a crash cut off. A write to a full disk writes nothing. A record
survives the end of the process when its call has returned, and a loss of power after `sync`.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgpack
import msgspec
import structlog

from mulligan.common.disk import writing_to
from mulligan.common.files import append
from mulligan.common.types import Attempt, DistilledTarget, Experience, Reflection

log = structlog.get_logger()
Part = TypeVar("Part", Attempt, Reflection)


class StepStarted(msgspec.Struct, frozen=True, tag="step_started"):
    """What the step reads. A repeated step reads the same."""

    step: int
    task_ids: list[str]
    memory_version: int
    policy_version: int


class AttemptSampled(msgspec.Struct, frozen=True, tag="attempt"):
    attempt: Attempt


class ReflectionSampled(msgspec.Struct, frozen=True, tag="reflection"):
    reflection: Reflection


class ExperienceCompleted(msgspec.Struct, frozen=True, tag="experience"):
    """The parts of a complete experience, by the ids of their records in the same file.

    The distilled target is the second attempt's sequences with `distilled_prompts` in place of the first segments.
    """

    experience_id: str
    run_id: str
    step: int
    environment: str
    task_id: str
    rollout: int
    first_id: str
    reflection_id: str | None
    second_id: str | None
    distilled_id: str | None
    distilled_prompts: list[list[int]]
    memory_entry_ids: list[str]
    not_distilled: str = ""


class StepCompleted(msgspec.Struct, frozen=True, tag="step_completed"):
    step: int
    metrics: dict[str, float]


JournalRecord = StepStarted | AttemptSampled | ReflectionSampled | ExperienceCompleted | StepCompleted
_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[JournalRecord] = msgspec.msgpack.Decoder(JournalRecord)


def journal_file(folder: Path, step: int) -> Path:
    return folder / f"{step:06}.msgpack"


def journaled_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.msgpack"))


def set_aside(folder: Path, step: int) -> None:
    """Renames a step's file, so that the step is sampled again. The file is kept."""
    path = journal_file(folder, step)
    if path.exists():
        path.rename(path.with_name(f"{path.name}.set-aside-{len(list(folder.glob(f'{path.name}.set-aside-*')))}"))


def sampled_chains(folder: Path, step: int) -> int:
    """The number of complete experiences of a step."""
    path = journal_file(folder, step)
    return sum(isinstance(record, ExperienceCompleted) for record, _ in read_records(path)) if path.exists() else 0


class StepJournal:
    """The file of one step, and the algorithm's `Recorder`.

    Opening it reads all records into memory. `start` fixes what the step reads; `add` appends each attempt and
    reflection; `complete` appends the links of an experience; `finish` appends the metrics. `find` answers from memory,
    so a repeated step samples only what is missing. The run's lock keeps other processes out.

    Writes raise DomainError DISK_FULL, and FileNotFoundError when the run's folder was removed.
    """

    def __init__(self, folder: Path, step: int):
        with writing_to(folder.parent):
            folder.mkdir(exist_ok=True)
            self._open(journal_file(folder, step))

    def _open(self, path: Path) -> None:
        self.started: StepStarted | None = None
        self.completed: StepCompleted | None = None
        self._parts: dict[str, Attempt | Reflection] = {}
        self._experiences: dict[str, ExperienceCompleted] = {}
        end = 0
        if path.exists():
            for record, offset in read_records(path):
                self._remember(record)
                end = offset
        self._file: BinaryIO = path.open("ab", buffering=0)
        if end < path.stat().st_size:
            log.warning("dropped a torn record", file=str(path), bytes=path.stat().st_size - end)
            self._file.truncate(end)

    @property
    def chains(self) -> int:
        """The number of complete experiences."""
        return len(self._experiences)

    def find(self, part_id: str, kind: type[Part]) -> Part | None:
        part = self._parts.get(part_id)
        return part if isinstance(part, kind) else None

    def add(self, part: Attempt | Reflection) -> None:
        self._append(AttemptSampled(part) if isinstance(part, Attempt) else ReflectionSampled(part))

    def complete(self, experience: Experience) -> None:
        reflection = experience.reflection
        second = experience.second_attempt
        distilled = experience.distilled
        prompts = [list(sequence.segments[0].token_ids) for sequence in distilled.sequences] if distilled else []
        record = ExperienceCompleted(
            experience_id=experience.experience_id,
            run_id=experience.run_id,
            step=experience.step,
            environment=experience.environment,
            task_id=experience.task_id,
            rollout=experience.rollout,
            first_id=experience.first_attempt.attempt_id,
            reflection_id=reflection.reflection_id if reflection else None,
            second_id=second.attempt_id if second else None,
            distilled_id=distilled.distilled_id if distilled else None,
            distilled_prompts=prompts,
            memory_entry_ids=list(experience.memory_entry_ids),
            not_distilled=experience.not_distilled,
        )
        if record != self._experiences.get(experience.experience_id):
            self._append(record)

    def start(self, record: StepStarted) -> None:
        self._append(record)

    def finish(self, record: StepCompleted) -> None:
        self._append(record)

    def sync(self) -> None:
        with writing_to(Path(self._file.name).parent):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _append(self, record: JournalRecord) -> None:
        payload = _ENCODER.encode(record)
        data = msgpack.packb([zlib.crc32(payload), payload])
        if os.fstat(self._file.fileno()).st_nlink == 0:  # the file was deleted: writes would be lost
            raise FileNotFoundError(errno.ENOENT, "the journal was removed", self._file.name)
        with writing_to(Path(self._file.name).parent, len(data)):
            append(self._file.fileno(), data)
        self._remember(record)

    def _remember(self, record: JournalRecord) -> None:
        match record:
            case StepStarted():
                self.started = record
            case AttemptSampled(attempt):
                self._parts[attempt.attempt_id] = attempt
            case ReflectionSampled(reflection):
                self._parts[reflection.reflection_id] = reflection
            case ExperienceCompleted():
                self._experiences[record.experience_id] = record
            case StepCompleted():
                self.completed = record


def read_experiences(path: Path) -> list[Experience]:
    """The complete experiences of one step's file, in (task, rollout) order. The run may be writing to it."""
    parts: dict[str, Attempt | Reflection] = {}
    chains: dict[str, ExperienceCompleted] = {}
    order: list[str] = []
    for record, _ in read_records(path):
        match record:
            case StepStarted():
                order = record.task_ids
            case AttemptSampled(attempt):
                parts[attempt.attempt_id] = attempt
            case ReflectionSampled(reflection):
                parts[reflection.reflection_id] = reflection
            case ExperienceCompleted():
                chains[record.experience_id] = record
    position = {task_id: slot for slot, task_id in reversed(list(enumerate(order)))}
    ordered = sorted(chains.values(), key=lambda chain: (position.get(chain.task_id, 0), chain.rollout))
    return [_joined(chain, parts) for chain in ordered]


def _joined(chain: ExperienceCompleted, parts: dict[str, Attempt | Reflection]) -> Experience:
    first = parts[chain.first_id]
    second = parts[chain.second_id] if chain.second_id else None
    reflection = parts[chain.reflection_id] if chain.reflection_id else None
    assert isinstance(first, Attempt) and not isinstance(second, Reflection) and not isinstance(reflection, Attempt)
    distilled = None
    if second is not None and reflection is not None:
        reflection = replace(reflection, reward=second.reward)
    if chain.distilled_id and second is not None and second.reward is not None:
        pairs = zip(second.sequences, chain.distilled_prompts, strict=True)
        sequences = tuple(sequence.with_prompt(prompt) for sequence, prompt in pairs)
        distilled = DistilledTarget(chain.distilled_id, second.attempt_id, sequences, second.reward)
    return Experience(
        experience_id=chain.experience_id,
        run_id=chain.run_id,
        step=chain.step,
        environment=chain.environment,
        task_id=chain.task_id,
        rollout=chain.rollout,
        first_attempt=first,
        reflection=reflection,
        second_attempt=second,
        distilled=distilled,
        memory_entry_ids=tuple(chain.memory_entry_ids),
        not_distilled=chain.not_distilled,
    )


def read_records(path: Path) -> Iterator[tuple[JournalRecord, int]]:
    """Each record with the offset of its end. Stops at the first torn or damaged one."""
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker(file, max_buffer_size=2**31 - 1)
        while True:
            try:
                checksum, payload = unpacker.unpack()
            except msgpack.OutOfData:
                return
            except (ValueError, TypeError, msgpack.UnpackException):
                return
            if not isinstance(payload, bytes) or zlib.crc32(payload) != checksum:
                return
            yield _DECODER.decode(payload), unpacker.tell()
