"""The journal of a run: every sample, on disk before it is used, and what was trained on.

Each training step has one append-only file, such as `journal/000012.msgpack`: a msgpack stream of `[crc32, payload]`
pairs. A payload is the msgpack of one record with a `type`. Any msgpack library reads them; `mulligan experiences`
prints them. A write to a full disk writes nothing. A record survives the end of the process when its call has returned,
and a loss of power after `sync`.

Damaged bytes cost the records that they are in: reading goes on at the next record whose checksum is right. Opening a
step to go on with it drops a last record that a crash cut off, and samples again what is lost. Where the rest cannot be
understood without what is lost, `StepJournal.flaw` says so.
"""

from __future__ import annotations

import errno
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import msgpack
import msgspec
import structlog

from mulligan.common.disk import writing_to
from mulligan.common.experience import Experience, Sample, Trained, TrainingTarget
from mulligan.common.files import append, move, sync
from mulligan.common.state_files import state_damaged
from mulligan.trainer.old_journal import AttemptSampled, OldExperience, ReflectionSampled, with_parents

log = structlog.get_logger()


class StepStarted(msgspec.Struct, frozen=True, tag="step_started"):
    """What the step reads. A repeated step reads the same.

    `environments` has the environment of each task; empty in runs of one environment. `horizon` is the limit of turns
    that the sampler set.
    """

    step: int
    task_ids: list[str]
    memory_version: int
    policy_version: int
    environments: list[str] = []
    horizon: int | None = None


class SamplingBegan(msgspec.Struct, frozen=True, tag="sampling_began"):
    """In runs with `rollout.max_staleness`, each time that a process begins to sample for the step: `policy_version`
    has learned `trained` steps. In this process, each later version has learned one step more."""

    step: int
    policy_version: int
    trained: int


class GroupsReplaced(msgspec.Struct, frozen=True, tag="groups_replaced"):
    """A further round of the step, from 1 on: the groups at `slots` gave no signal and are replaced by groups of
    `task_ids`, one for one. The slots of the new ones follow those of all rounds before."""

    step: int
    round: int
    slots: list[int]
    task_ids: list[str]
    environments: list[str] = []
    horizon: int | None = None


class SampleRecorded(msgspec.Struct, frozen=True, tag="sample"):
    sample: Sample


class Credit(msgspec.Struct, frozen=True):
    """A reward that the algorithm gave, and its components."""

    reward: float | None
    parts: dict[str, float]


class ExperienceCompleted(msgspec.Struct, frozen=True, tag="experience_completed"):
    """A complete experience. Its samples are named by the ids of their records in the same file. `credits` are the
    rewards that the algorithm gave to samples which have none of the environment."""

    experience_id: str
    run_id: str
    step: int
    environment: str
    task_id: str
    rollout: int
    algorithm: str
    sample_ids: list[str]
    credits: dict[str, Credit]
    targets: list[TrainingTarget]
    memory_entry_ids: list[str]
    untrained: list[str]
    memory_use_id: str = ""
    memory_left_out_id: str = ""


class StepTrained(msgspec.Struct, frozen=True, tag="trained"):
    """What the learner was given in this step, before it was dealt out over optimizer steps."""

    data: list[Trained]


class StepCompleted(msgspec.Struct, frozen=True, tag="step_completed"):
    step: int
    metrics: dict[str, float]


JournalRecord = (
    StepStarted | SamplingBegan | GroupsReplaced | SampleRecorded | ExperienceCompleted | StepTrained | StepCompleted
)
_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[JournalRecord | AttemptSampled | ReflectionSampled | OldExperience] = (
    msgspec.msgpack.Decoder(JournalRecord | AttemptSampled | ReflectionSampled | OldExperience)
)

# Of a pair in msgpack: an array of two, an integer, the size of binary data.
_HEADER = re.compile(rb"\x92([\x00-\x7f]|\xcc.|\xcd..|\xce....)(\xc4.|\xc5..|\xc6....)", re.DOTALL)
_ANY_HEADER = re.compile(rb"(?=%s)" % _HEADER.pattern, re.DOTALL)


_FILE = re.compile(r"(0[0-9]{5}|[1-9][0-9]{5,9})\.msgpack")


def journal_file(folder: Path, step: int) -> Path:
    return folder / f"{step:06}.msgpack"


def journaled_steps(folder: Path) -> list[int]:
    """Of files with other names, such as copies, nothing is known."""
    return sorted(int(found[1]) for path in folder.glob("*.msgpack") if (found := _FILE.fullmatch(path.name)))


def set_aside(folder: Path, step: int) -> None:
    """Renames a step's file, so that the step is sampled again. The file is kept."""
    path = journal_file(folder, step)
    if path.exists():
        move(path, path.with_name(f"{path.name}.set-aside-{len(list(folder.glob(f'{path.name}.set-aside-*')))}"))


def is_sampled(folder: Path, step: int, rollouts_per_task: int) -> bool:
    """Whether all experiences that the step's file begins are complete."""
    expected = 0
    samples = set()
    found: dict[str, list[str]] = {}
    for record, _ in read_records(journal_file(folder, step)):
        match record:
            case StepStarted() | GroupsReplaced():
                expected += len(record.task_ids) * rollouts_per_task
            case SampleRecorded(sample):
                samples.add(sample.sample_id)
            case ExperienceCompleted():
                found[record.experience_id] = record.sample_ids
    return 0 < expected == sum(samples.issuperset(ids) for ids in found.values())


class StepJournal:
    """The file of one step, and the algorithm's `Recorder`.

    Opening it reads all records into memory. `start` fixes what the step reads, `replace` the tasks of a further round;
    `begin` says which weights sample from now on; `add` appends each sample; `complete` appends the links of an
    experience; `train` appends what is trained on; `finish` appends the metrics. `find` answers from memory, so a
    repeated step samples only what is missing. The run's lock keeps other processes out.

    Writes raise DomainError DISK_FULL, and FileNotFoundError when the run's folder was removed.
    """

    def __init__(self, folder: Path, step: int):
        self._step = step
        with writing_to(folder.parent):
            if not folder.exists():
                folder.mkdir()
                sync(folder.parent)
            self._open(journal_file(folder, step))

    def _open(self, path: Path) -> None:
        self.started: StepStarted | None = None
        self.begun: list[SamplingBegan] = []  # in order
        self.replaced: dict[int, GroupsReplaced] = {}  # by round
        self.trained: StepTrained | None = None
        self.completed: StepCompleted | None = None
        self._samples: dict[str, Sample] = {}
        self._experiences: dict[str, ExperienceCompleted] = {}
        self.damage: list[Damage] = []  # before records that can be read
        end = 0
        if path.exists():
            for record, offset in read_records(path, self.damage.append):
                self._remember(record)
                end = offset
        is_new = not path.exists()
        self._file: BinaryIO = path.open("ab", buffering=0)
        if is_new:
            sync(path.parent)
        if end < path.stat().st_size:
            log.warning("dropped a torn record", file=str(path), bytes=path.stat().st_size - end)
            self._file.truncate(end)
        lost = [one for one, record in self._experiences.items() if not self._samples.keys() >= {*record.sample_ids}]
        for experience_id in lost:
            del self._experiences[experience_id]

    def flaw(self, *, overlapping: bool) -> str:
        """Why the step cannot go on with these records; empty if it can. `overlapping`: in a run with
        `rollout.max_staleness`."""
        if not self.damage:
            return ""
        tasks = 0 if self.started is None else len(self.started.task_ids)
        tasks += sum(len(record.task_ids) for record in self.replaced.values())
        slots = [
            int(found[1]) for found in map(re.compile(f"-s{self._step}-t(\\d+)-r\\d+-").search, self._samples) if found
        ]
        if overlapping:
            return "which weights its samples have may be lost"
        if self.started is None or sorted(self.replaced) != list(range(1, len(self.replaced) + 1)):
            return "which tasks it plays is lost"
        return "which tasks it plays is lost" if max(slots, default=0) >= tasks else ""

    @property
    def experiences(self) -> int:
        """The number of complete experiences."""
        return len(self._experiences)

    def find(self, sample_id: str) -> Sample | None:
        return self._samples.get(sample_id)

    def add(self, sample: Sample) -> None:
        self._append(SampleRecorded(sample))

    def complete(self, experience: Experience) -> None:
        record = ExperienceCompleted(
            experience_id=experience.experience_id,
            run_id=experience.run_id,
            step=experience.step,
            environment=experience.environment,
            task_id=experience.task_id,
            rollout=experience.rollout,
            algorithm=experience.algorithm,
            sample_ids=[sample.sample_id for sample in experience.samples],
            credits={
                sample.sample_id: Credit(sample.reward, dict(sample.reward_parts))
                for sample in experience.samples
                if not sample.is_episode and sample.reward is not None
            },
            targets=list(experience.targets),
            memory_entry_ids=list(experience.memory_entry_ids),
            untrained=list(experience.untrained),
            memory_use_id=experience.memory_use_id,
            memory_left_out_id=experience.memory_left_out_id,
        )
        if record != self._experiences.get(experience.experience_id):
            self._append(record)

    def train(self, data: Sequence[Trained]) -> None:
        record = StepTrained(list(data))
        if record != self.trained:
            self._append(record)

    def start(self, record: StepStarted) -> None:
        self._append(record)

    def begin(self, record: SamplingBegan) -> None:
        self._append(record)

    def replace(self, record: GroupsReplaced) -> None:
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
            case SamplingBegan():
                self.begun.append(record)
            case GroupsReplaced():
                self.replaced[record.round] = record
            case SampleRecorded(sample):
                self._samples[sample.sample_id] = sample
            case ExperienceCompleted():
                self._experiences[record.experience_id] = record
            case StepTrained():
                self.trained = record
            case StepCompleted():
                self.completed = record


def read_experiences(path: Path) -> list[Experience]:
    """The complete experiences of one step's file, in (task, rollout) order, without those of which a sample is lost.
    The run may be writing to it."""
    samples: dict[str, Sample] = {}
    completed: dict[str, ExperienceCompleted] = {}
    trained: dict[str, list[Trained]] = {}
    for record, _ in read_records(path):
        match record:
            case SampleRecorded(sample):
                samples[sample.sample_id] = sample
            case ExperienceCompleted():
                completed[record.experience_id] = record
            case StepTrained(data):
                trained = {}
                for datum in data:
                    trained.setdefault(datum.source_id, []).append(datum)
    whole = [record for record in completed.values() if samples.keys() >= {*record.sample_ids}]
    whole.sort(key=lambda record: (slot_of(record.experience_id), record.rollout))
    return [_joined(record, samples, trained) for record in whole]


def read_metrics(path: Path) -> dict[str, float] | None:
    """The metrics that a step ended with. None without a file, or where it does not have them."""
    records = (record for record, _ in read_records(path)) if path.exists() else ()
    return next((record.metrics for record in records if isinstance(record, StepCompleted)), None)


def step_of(experience_id: str) -> int:
    """The step of an experience, by its id `RUN-sSTEP-tSLOT-rROLLOUT`. Raises ValueError for another text."""
    return int(experience_id.rpartition("-t")[0].rpartition("-s")[2])


def slot_of(experience_id: str) -> int:
    """Which group of its step an experience is of, by its id `RUN-sSTEP-tSLOT-rROLLOUT`."""
    return int(experience_id.rpartition("-r")[0].rpartition("-t")[2])


def _joined(
    record: ExperienceCompleted, samples: Mapping[str, Sample], trained: Mapping[str, list[Trained]]
) -> Experience:
    found = [samples[sample_id] for sample_id in record.sample_ids]
    found = [_credited(one, record.credits.get(one.sample_id)) for one in found]
    ids = [*record.sample_ids, *(target.target_id for target in record.targets)]
    return Experience(
        experience_id=record.experience_id,
        run_id=record.run_id,
        step=record.step,
        environment=record.environment,
        task_id=record.task_id,
        rollout=record.rollout,
        samples=tuple(found),
        targets=tuple(record.targets),
        memory_entry_ids=tuple(record.memory_entry_ids),
        untrained=tuple(record.untrained),
        algorithm=record.algorithm,
        trained=tuple(datum for source_id in ids for datum in trained.get(source_id, ())),
        memory_use_id=record.memory_use_id,
        memory_left_out_id=record.memory_left_out_id,
    )


def _credited(sample: Sample, credit: Credit | None) -> Sample:
    return sample if credit is None else replace(sample, reward=credit.reward, reward_parts=credit.parts)


@dataclass(frozen=True, slots=True)
class Damage:
    """The bytes `begin` to `end` of a file, the latter not included, in which there is no whole record."""

    path: Path
    begin: int
    end: int

    def __str__(self) -> str:
        return f"bytes {self.begin} to {self.end} of {self.path} are damaged"


def _warn(damage: Damage) -> None:
    log.warning("damaged records", text=str(damage))


def read_records(path: Path, tell: Callable[[Damage], None] = _warn) -> Iterator[tuple[JournalRecord, int]]:
    """Each record with the offset of its end. Records of older versions are given as today's. Leaves out what is
    damaged, and tells of it unless it is the file's end, which may be a record that is being written."""
    old: dict[str, Sample] = {}
    for record, end in _read(path, tell):
        match record:
            case AttemptSampled() | ReflectionSampled():
                sample = record.sample()
                old[sample.sample_id] = sample
                yield SampleRecorded(sample), end
            case OldExperience() if old.keys() >= {*record.sample_ids}:
                for sample in with_parents([old[sample_id] for sample_id in record.sample_ids]):
                    yield SampleRecorded(sample), end
                yield _of_old(record, old), end
            case OldExperience():  # a sample of it is lost
                continue
            case _:
                yield record, end


def _of_old(record: OldExperience, samples: Mapping[str, Sample]) -> ExperienceCompleted:
    return ExperienceCompleted(
        experience_id=record.experience_id,
        run_id=record.run_id,
        step=record.step,
        environment=record.environment,
        task_id=record.task_id,
        rollout=record.rollout,
        algorithm="erl",
        sample_ids=record.sample_ids,
        credits={sample_id: Credit(reward, {}) for sample_id, reward in record.credits(samples).items()},
        targets=record.targets(samples),
        memory_entry_ids=record.memory_entry_ids,
        untrained=[record.not_distilled] if record.not_distilled else [],
    )


def _read(
    path: Path, tell: Callable[[Damage], None]
) -> Iterator[tuple[JournalRecord | AttemptSampled | ReflectionSampled | OldExperience, int]]:
    content = path.read_bytes()
    end = 0
    while end < len(content):
        found = _payload(content, end)
        if found is None:
            begin = end
            for header in _ANY_HEADER.finditer(content, begin + 1):
                end = header.start()
                if found := _payload(content, end):
                    break
            if found is None:
                return
            tell(Damage(path, begin, end))
        begin = end
        payload, end = found
        try:
            record = _DECODER.decode(payload)
        except (msgspec.MsgspecError, RecursionError) as error:  # its checksum is right
            what = f"bytes {begin} to {end} of {path} are no record that this release knows"
            raise state_damaged(path, f"{what}: {error}") from error
        yield record, end


def _payload(content: bytes, begin: int) -> tuple[bytes, int] | None:
    """The payload of the pair that begins here, and where it ends. None where there is none, or its checksum is
    wrong."""
    header = _HEADER.match(content, begin)
    if header is None:
        return None
    checksum, size = (int.from_bytes(number[1:] or number) for number in header.groups())
    payload = content[header.end() : header.end() + size]
    if len(payload) < size or zlib.crc32(payload) != checksum:
        return None
    return payload, header.end() + size
