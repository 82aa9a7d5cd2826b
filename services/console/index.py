"""An index of the experiences of all runs, so that they can be filtered: a SQLite file in the user's cache folder.

It says nothing that the journals do not say, and can be removed at any time. A step's file is read again when it has
changed. https://www.sqlite.org/fts5.html
"""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import structlog

from mulligan.common.experience import Experience
from mulligan.common.text import bounded
from mulligan.trainer.journal import read_experiences, slot_of

log = structlog.get_logger()
_VERSION = 2  # of the schema; an index of another one is made anew
_TEXT = 20_000  # characters of an experience that can be searched
_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
CREATE TABLE IF NOT EXISTS files (run TEXT, step INTEGER, size INTEGER, changed INTEGER, PRIMARY KEY (run, step))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS choices (id INTEGER PRIMARY KEY, run TEXT, name TEXT, value TEXT, UNIQUE (run, name, value));
CREATE TABLE IF NOT EXISTS experiences (
    id INTEGER PRIMARY KEY, run TEXT, step INTEGER, slot INTEGER, rollout INTEGER, experience_id TEXT,
    environment TEXT, task_id TEXT, algorithm TEXT, roles TEXT, rewards TEXT, outcome TEXT, reward REAL,
    gain REAL, turns INTEGER, tokens INTEGER, memory INTEGER, text TEXT
);
CREATE INDEX IF NOT EXISTS of_step ON experiences (run, step DESC, slot, rollout);
CREATE INDEX IF NOT EXISTS of_reward ON experiences (run, reward);
CREATE INDEX IF NOT EXISTS of_id ON experiences (run, experience_id);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5 (text, content = 'experiences', content_rowid = 'id');
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON experiences BEGIN
    INSERT INTO words (rowid, text) VALUES (new.id, new.text);
END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON experiences BEGIN
    INSERT INTO words (words, rowid, text) VALUES ('delete', old.id, old.text);
END;
"""


@dataclass(frozen=True, slots=True)
class ExperienceRow:
    """An experience in short. `reward` is that of its first sample, None without one; `gain` is the reward of its last
    episode less that, None where there is one episode alone. `outcome` is that of its first sample. `rewards` has the
    reward of each sample that has one, such as "first 0 · second 1"."""

    run: str
    step: int
    slot: int
    rollout: int
    experience_id: str
    environment: str
    task_id: str
    algorithm: str
    roles: str
    rewards: str
    outcome: str
    reward: float | None
    gain: float | None
    turns: int
    tokens: int
    memory: int


_NAMES = [one.name for one in fields(ExperienceRow)]
_COLUMNS = ", ".join(_NAMES)


@dataclass(frozen=True, slots=True)
class ExperienceFilter:
    """Which experiences of a run: all that fulfil every condition that is set. `text` has words, of which the last one
    may be a beginning."""

    run: str
    step: int | None = None
    slot: int | None = None
    environment: str = ""
    role: str = ""
    outcome: str = ""
    reward_from: float | None = None
    reward_to: float | None = None
    text: str = ""

    def conditions(self) -> Iterator[tuple[str, object]]:
        yield "run = ?", self.run
        if self.step is not None:
            yield "step = ?", self.step
        if self.slot is not None:
            yield "slot = ?", self.slot
        if self.environment:
            yield "environment = ?", self.environment
        if self.role:
            yield "instr(roles, ?) > 0", f" {self.role} "
        if self.outcome:
            yield "outcome = ?", self.outcome
        if self.reward_from is not None:
            yield "reward >= ?", self.reward_from
        if self.reward_to is not None:
            yield "reward <= ?", self.reward_to
        if match := _match(self.text):
            yield "id IN (SELECT rowid FROM words WHERE words MATCH ?)", match


@dataclass(frozen=True, slots=True)
class FoundExperiences:
    rows: Sequence[ExperienceRow]
    count: int  # of all that fulfil the conditions


@dataclass(frozen=True, slots=True)
class Bin:
    """Of a histogram: rewards from `low` to `high`, both included."""

    low: float
    high: float
    count: int


class ExperienceIndex:
    """One writer, any number of readers, in threads of their own."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._writing = threading.Lock()
        self._writer = self._open()
        if not self._is_ours():
            self._writer.close()
            for end in ("", "-wal", "-shm"):
                Path(f"{path}{end}").unlink(missing_ok=True)
            self._writer = self._open()
        self._writer.executescript(f"{_SCHEMA}\nPRAGMA user_version = {_VERSION};")
        self._local = threading.local()

    def close(self) -> None:
        self._writer.close()

    def _is_ours(self) -> bool:
        """Whether the file is empty, or an index of this version."""
        try:
            (version,) = self._writer.execute("PRAGMA user_version").fetchone()
            (tables,) = self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.DatabaseError:
            return False
        return bool(version == _VERSION or tables == 0)

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=10.0)

    @property
    def _reader(self) -> sqlite3.Connection:
        if not hasattr(self._local, "connection"):
            self._local.connection = self._open()
        found: sqlite3.Connection = self._local.connection
        return found

    def add_step(self, run: str, step: int, file: Path) -> bool:
        """Reads a step's file, if it has changed since it was read. Returns whether it had."""
        state = file.stat()
        known = self._reader.execute("SELECT size, changed FROM files WHERE run = ? AND step = ?", (run, step))
        if known.fetchone() == (state.st_size, state.st_mtime_ns):
            return False
        experiences = read_experiences(file)
        rows = [(*astuple(row_of(run, one)), text_of(one)) for one in experiences]
        choices = dict.fromkeys(pair for one in experiences for pair in _choices(one))
        with self._writing:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                self._writer.execute("DELETE FROM experiences WHERE run = ? AND step = ?", (run, step))
                marks = ", ".join("?" * (len(_NAMES) + 1))
                self._writer.executemany(f"INSERT INTO experiences ({_COLUMNS}, text) VALUES ({marks})", rows)
                chosen = "INSERT OR IGNORE INTO choices (run, name, value) VALUES (?, ?, ?)"
                self._writer.executemany(chosen, [(run, *pair) for pair in choices])
                values = (run, step, state.st_size, state.st_mtime_ns)
                self._writer.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", values)
                self._writer.execute("COMMIT")
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
        return True

    def find(
        self, wanted: ExperienceFilter, *, after: int = 0, limit: int = 50, newest_first: bool = True
    ) -> FoundExperiences:
        """Rows from the `after`-th on, in the order of the journal, or the other way round."""
        where, values = _where(wanted)
        order = "DESC" if newest_first else "ASC"
        query = (
            f"SELECT {_COLUMNS} FROM experiences WHERE {where} ORDER BY step {order}, slot, rollout LIMIT ? OFFSET ?"
        )
        rows = [ExperienceRow(*row) for row in self._reader.execute(query, (*values, limit, after))]
        (count,) = self._reader.execute(f"SELECT count(*) FROM experiences WHERE {where}", values).fetchone()
        return FoundExperiences(rows, count)

    def place(self, wanted: ExperienceFilter, experience_id: str) -> int | None:
        """How many come before this one in the order of `find`, the newest first; None where it is not among them."""
        where, values = _where(wanted)
        mine = f"SELECT step, slot, rollout FROM experiences WHERE {where} AND experience_id = ?"
        found = self._reader.execute(mine, (*values, experience_id)).fetchone()
        if found is None:
            return None
        step, slot, rollout = found
        before = f"SELECT count(*) FROM experiences WHERE {where} AND"
        (later,) = self._reader.execute(f"{before} step > ?", (*values, step)).fetchone()
        within = f"{before} step = ? AND (slot, rollout) < (?, ?)"
        (beside,) = self._reader.execute(within, (*values, step, slot, rollout)).fetchone()
        return int(later + beside)

    def neighbours(self, wanted: ExperienceFilter, experience_id: str) -> tuple[str | None, str | None]:
        """The ids of the experiences before and after this one, in the order of `find`; None at an end."""
        where, values = _where(wanted)
        place = "SELECT step, slot, rollout FROM experiences WHERE run = ? AND experience_id = ?"
        found = self._reader.execute(place, (wanted.run, experience_id)).fetchone()
        if found is None:
            return None, None
        return self._beside(where, values, found, after=False), self._beside(where, values, found, after=True)

    def _beside(self, where: str, values: list[object], place: tuple[int, int, int], *, after: bool) -> str | None:
        step, slot, rollout = place
        beyond, order, steps = (">", "ASC", "DESC") if after else ("<", "DESC", "ASC")
        select = f"SELECT experience_id FROM experiences WHERE {where} AND"
        within = f"{select} step = ? AND (slot, rollout) {beyond} (?, ?) ORDER BY slot {order}, rollout {order} LIMIT 1"
        others = f"{select} step {'<' if after else '>'} ? ORDER BY step {steps}, slot {order}, rollout {order} LIMIT 1"
        found = self._reader.execute(within, (*values, step, slot, rollout)).fetchone()
        found = found or self._reader.execute(others, (*values, step)).fetchone()
        return found[0] if found else None

    def rewards(self, wanted: ExperienceFilter, bins: int = 20) -> list[Bin]:
        """A histogram of the rewards; as many bins as there are different rewards, if those are few."""
        where, values = _where(wanted)
        query = f"SELECT reward, count(*) FROM experiences WHERE {where} AND reward IS NOT NULL GROUP BY reward"
        return _bins(self._reader.execute(query, values).fetchall(), bins)

    def choices(self, run: str) -> dict[str, list[str]]:
        """The environments, outcomes and roles of a run, to choose from, in the order in which they came."""
        found: dict[str, list[str]] = {"environment": [], "outcome": [], "role": []}
        for name, value in self._reader.execute("SELECT name, value FROM choices WHERE run = ? ORDER BY id", (run,)):
            found[name].append(value)
        return found


def histogram(rewards: Iterable[float], bins: int = 20) -> list[Bin]:
    """As `ExperienceIndex.rewards`, of these."""
    return _bins(sorted(Counter(rewards).items()), bins)


def _bins(counts: Sequence[tuple[float, int]], bins: int) -> list[Bin]:
    """`counts` has the different rewards in ascending order, each with how often it is there."""
    if len(counts) <= bins:
        return [Bin(reward, reward, count) for reward, count in counts]
    low, high = counts[0][0], counts[-1][0]
    width = (high - low) / bins
    sums = [0] * bins
    for reward, count in counts:
        sums[min(int((reward - low) / width), bins - 1)] += count
    return [Bin(low + width * place, low + width * (place + 1), count) for place, count in enumerate(sums)]


def _where(wanted: ExperienceFilter) -> tuple[str, list[object]]:
    conditions = list(wanted.conditions())
    return " AND ".join(condition for condition, _ in conditions), [value for _, value in conditions]


def _match(text: str) -> str:
    """A query of FTS5 for all words of a text; each is quoted, so that none is an operator."""
    words = ['"' + word.replace('"', '""') + '"' for word in text.split()]
    return " ".join(words) + "*" if words else ""


def _choices(one: Experience) -> Iterator[tuple[str, str]]:
    yield "environment", one.environment
    yield from (("role", sample.role) for sample in one.samples)
    yield from (("outcome", str(sample.outcome)) for sample in one.samples[:1])


def row_of(run: str, one: Experience) -> ExperienceRow:
    episodes = [sample for sample in one.samples if sample.is_episode]
    first, last = (episodes[0], episodes[-1]) if episodes else (None, None)
    reward = one.samples[0].reward if one.samples else None
    gain = None
    if first is not last and first is not None and last is not None and None not in (first.reward, last.reward):
        gain = (last.reward or 0.0) - (first.reward or 0.0)
    roles = f" {' '.join(dict.fromkeys(sample.role for sample in one.samples))} "
    rewards = " · ".join(f"{sample.role} {sample.reward:.3g}" for sample in one.samples if sample.reward is not None)
    tokens = sum(sequence.sampled_count for sample in one.samples for sequence in sample.sequences)
    outcome = str(one.samples[0].outcome) if one.samples else ""
    return ExperienceRow(
        run,
        one.step,
        slot_of(one.experience_id),
        one.rollout,
        one.experience_id,
        one.environment,
        one.task_id,
        one.algorithm,
        roles,
        rewards,
        outcome,
        reward,
        gain,
        turns=sum(len(episode.turns) for episode in episodes),
        tokens=tokens,
        memory=len(one.memory_entry_ids),
    )


def text_of(one: Experience) -> str:
    """What can be searched: ids, observations, answers, feedback, errors."""
    parts = [one.experience_id, one.task_id]
    for sample in one.samples:
        parts += [part for turn in sample.turns for part in (turn.observation, turn.text)]
        parts += [sample.text, sample.feedback, sample.error, sample.final_observation]
    return bounded("\n".join(filter(None, parts)), _TEXT)
