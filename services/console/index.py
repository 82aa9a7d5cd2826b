"""An index of the experiences of all runs, so that they can be filtered: a SQLite file in the user's cache folder.

It says nothing that the journals do not say, and can be removed at any time. A step's file is read again when it has
changed. Words are searched by SQLite (https://www.sqlite.org/fts5.html), everything else by arrays (`facts`).
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog

from mulligan.common.experience import Experience
from mulligan.common.text import bounded
from mulligan.console.facts import Mask, RunFacts, packed
from mulligan.console.histogram import Bin, histogram
from mulligan.trainer.journal import read_experiences, slot_of

log = structlog.get_logger()
_VERSION = 3  # of the schema; an index of another one is made anew
_TEXT = 20_000  # characters of an experience that can be searched
_FILES = ("", "-wal", "-shm")  # what SQLite adds to the name
_MOST_RUNS = 8  # whose facts are kept in memory: 5 MB for 100,000 experiences
_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = OFF;
CREATE TABLE IF NOT EXISTS files (
    revision INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT, step INTEGER, size INTEGER, changed INTEGER, facts BLOB,
    UNIQUE (run, step)
);
CREATE INDEX IF NOT EXISTS of_run ON files (run);
CREATE TABLE IF NOT EXISTS codes (id INTEGER PRIMARY KEY, value TEXT UNIQUE);
CREATE TABLE IF NOT EXISTS choices (id INTEGER PRIMARY KEY, run TEXT, name TEXT, value TEXT, UNIQUE (run, name, value));
CREATE TABLE IF NOT EXISTS experiences (
    id INTEGER PRIMARY KEY, run TEXT, step INTEGER, slot INTEGER, rollout INTEGER, experience_id TEXT,
    environment TEXT, task_id TEXT, algorithm TEXT, roles TEXT, rewards TEXT, outcome TEXT, reward REAL,
    gain REAL, turns INTEGER, tokens INTEGER, memory INTEGER
);
CREATE INDEX IF NOT EXISTS of_step ON experiences (run, step);
CREATE INDEX IF NOT EXISTS of_id ON experiences (run, experience_id);
CREATE TABLE IF NOT EXISTS texts (id INTEGER PRIMARY KEY, text TEXT);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5 (text, content = 'texts', content_rowid = 'id');
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON texts BEGIN
    INSERT INTO words (rowid, text) VALUES (new.id, new.text);
END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON texts BEGIN
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

    def fits(self, facts: RunFacts) -> Mask:
        """Which rows fulfil all conditions but those of `text`."""
        rows = facts.rows
        found = np.ones(len(rows), np.bool_)
        if self.step is not None:
            found &= rows["step"] == self.step
        if self.slot is not None:
            found &= rows["slot"] == self.slot
        if self.environment:
            found &= facts.coded("environment", lambda text: text == self.environment)
        if self.role:
            found &= facts.coded("roles", lambda text: f" {self.role} " in text)
        if self.outcome:
            found &= facts.coded("outcome", lambda text: text == self.outcome)
        if self.reward_from is not None:
            found &= rows["reward"] >= self.reward_from
        if self.reward_to is not None:
            found &= rows["reward"] <= self.reward_to
        return found


@dataclass(frozen=True, slots=True)
class FoundExperiences:
    rows: Sequence[ExperienceRow]
    count: int  # of all that fulfil the conditions


@dataclass(frozen=True, slots=True)
class FoundPage(FoundExperiences):
    """`bins` are of the rewards of all that fulfil the other conditions, so that another bin can be chosen."""

    bins: Sequence[Bin]


class ExperienceIndex:
    """One writer, any number of readers, in threads of their own."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = path
        self._keep_private()
        self._writing = threading.Lock()
        self._writer = self._open()
        if not self._is_ours():
            self._writer.close()
            for end in _FILES:
                Path(f"{path}{end}").unlink(missing_ok=True)
            self._keep_private()
            self._writer = self._open()
        self._writer.executescript(f"{_SCHEMA}\nPRAGMA user_version = {_VERSION};")
        self._local = threading.local()
        self._facts: dict[str, RunFacts] = {}  # the latest used last
        self._refreshing = threading.Lock()

    def close(self) -> None:
        self._writer.close()

    def _keep_private(self) -> None:
        """It has the texts of runs: only its user may read it, also one that an earlier release made for all. SQLite
        gives its other files the mode of the first."""
        os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600))
        for end in _FILES:
            with suppress(FileNotFoundError):
                Path(f"{self._path}{end}").chmod(0o600)

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
        rows = [row_of(run, one) for one in experiences]
        texts = [text_of(one) for one in experiences]
        choices = dict.fromkeys(pair for one in experiences for pair in _choices(one))
        with self._writing:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                self._remove(run, step)
                facts = self._put(rows, texts)
                chosen = "INSERT OR IGNORE INTO choices (run, name, value) VALUES (?, ?, ?)"
                self._writer.executemany(chosen, [(run, *pair) for pair in choices])
                values = (run, step, state.st_size, state.st_mtime_ns, facts)
                file_row = "INSERT OR REPLACE INTO files (run, step, size, changed, facts) VALUES (?, ?, ?, ?, ?)"
                self._writer.execute(file_row, values)
                self._writer.execute("COMMIT")
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
        return True

    def _remove(self, run: str, step: int) -> None:
        of_step = "SELECT id FROM experiences WHERE run = ? AND step = ?"
        self._writer.execute(f"DELETE FROM texts WHERE id IN ({of_step})", (run, step))
        self._writer.execute("DELETE FROM experiences WHERE run = ? AND step = ?", (run, step))

    def _put(self, rows: Sequence[ExperienceRow], texts: Sequence[str]) -> bytes:
        """The facts of the rows."""
        (last,) = self._writer.execute("SELECT coalesce(max(id), 0) FROM experiences").fetchone()
        ids = range(last + 1, last + 1 + len(rows))
        values = dict.fromkeys(value for row in rows for value in (row.roles, row.outcome, row.environment))
        self._writer.executemany("INSERT OR IGNORE INTO codes (value) VALUES (?)", [(value,) for value in values])
        code = {value: number for number, value in self._writer.execute("SELECT id, value FROM codes")}
        marks = ", ".join("?" * (len(_NAMES) + 1))
        into = f"INSERT INTO experiences (id, {_COLUMNS}) VALUES ({marks})"
        self._writer.executemany(into, [(number, *astuple(row)) for number, row in zip(ids, rows, strict=True)])
        self._writer.executemany("INSERT INTO texts VALUES (?, ?)", zip(ids, texts, strict=True))
        return packed(
            [
                (
                    *(number, row.step, row.slot, row.rollout, row.reward),
                    *(code[row.roles], code[row.outcome], code[row.environment]),
                )
                for number, row in zip(ids, rows, strict=True)
            ]
        )

    def find(self, wanted: ExperienceFilter, *, after: int = 0, limit: int = 50) -> FoundExperiences:
        """Rows from the `after`-th on: the latest step first, within a step in the order of the journal."""
        facts = self._facts_of(wanted.run)
        return self._found(facts, self._matching(facts, wanted), after, limit)

    def page(self, wanted: ExperienceFilter, *, after: int = 0, limit: int = 50, bins: int = 20) -> FoundPage:
        """As `find`, with a histogram."""
        facts = self._facts_of(wanted.run)
        any_reward = self._matching(facts, replace(wanted, reward_from=None, reward_to=None))
        by_reward = ExperienceFilter(wanted.run, reward_from=wanted.reward_from, reward_to=wanted.reward_to)
        found = self._found(facts, any_reward & by_reward.fits(facts), after, limit)
        return FoundPage(found.rows, found.count, _histogram(facts, any_reward, bins))

    def rewards(self, wanted: ExperienceFilter, bins: int = 20) -> list[Bin]:
        """A histogram of the rewards; as many bins as there are different rewards, if those are few."""
        facts = self._facts_of(wanted.run)
        return _histogram(facts, self._matching(facts, wanted), bins)

    def place(self, wanted: ExperienceFilter, experience_id: str) -> int | None:
        """How many come before this one in the order of `find`; None where it is not among them."""
        facts = self._facts_of(wanted.run)
        place = self._place(facts, wanted.run, experience_id)
        if place is None:
            return None
        matching = self._matching(facts, wanted)
        return int(matching[:place].sum()) if matching[place] else None

    def neighbours(self, wanted: ExperienceFilter, experience_id: str) -> tuple[str | None, str | None]:
        """The ids of the experiences before and after this one, in the order of `find`; None at an end."""
        facts = self._facts_of(wanted.run)
        place = self._place(facts, wanted.run, experience_id)
        if place is None:
            return None, None
        places = np.flatnonzero(self._matching(facts, wanted))
        before, after = places[places < place], places[places > place]
        return self._name(facts, before[-1:]), self._name(facts, after[:1])

    def _name(self, facts: RunFacts, place: npt.NDArray[np.intp]) -> str | None:
        """The id of the experience at a place, if there is one."""
        query = "SELECT experience_id FROM experiences WHERE id = ?"
        found = [self._reader.execute(query, (number,)).fetchone() for number in facts.rows["id"][place].tolist()]
        return found[0][0] if found and found[0] else None

    def _facts_of(self, run: str) -> RunFacts:
        """As the index has them now, also where another process wrote it."""
        changed = "SELECT revision, step, facts FROM files WHERE run = ? AND revision > ?"
        with self._refreshing:
            known = self._facts.pop(run, None) or RunFacts()
            if newer := self._reader.execute(changed, (run, known.revision)).fetchall():
                known = known.with_steps(newer, dict(self._reader.execute("SELECT id, value FROM codes")))
            self._facts[run] = known
            if len(self._facts) > _MOST_RUNS:
                del self._facts[next(iter(self._facts))]
        return known

    def _matching(self, facts: RunFacts, wanted: ExperienceFilter) -> Mask:
        found = wanted.fits(facts)
        match = _match(wanted.text)
        return found & facts.among(self._with_words(match, *facts.span)) if match and len(found) else found

    def _with_words(self, match: str, low: int, high: int) -> npt.NDArray[np.int64]:
        """The ids with these words. One text with all of them is read twice as fast as a row for each."""
        query = "SELECT group_concat(rowid, ' ') FROM words WHERE words MATCH ? AND rowid BETWEEN ? AND ?"
        (text,) = self._reader.execute(query, (match, low, high)).fetchone()
        return np.fromstring(text or "", np.int64, sep=" ")

    def _found(self, facts: RunFacts, matching: Mask, after: int, limit: int) -> FoundExperiences:
        places = np.flatnonzero(matching)
        return FoundExperiences(self._rows(facts.rows["id"][places[after : after + limit]]), len(places))

    def _rows(self, ids: npt.NDArray[np.int64]) -> list[ExperienceRow]:
        """In this order, without those that another revision of a step has replaced meanwhile."""
        marks = ", ".join("?" * len(ids))
        query = f"SELECT id, {_COLUMNS} FROM experiences WHERE id IN ({marks})"
        found = {row[0]: ExperienceRow(*row[1:]) for row in self._reader.execute(query, ids.tolist())}
        return [found[number] for number in ids.tolist() if number in found]

    def _place(self, facts: RunFacts, run: str, experience_id: str) -> int | None:
        """In the facts' rows."""
        query = "SELECT id FROM experiences WHERE run = ? AND experience_id = ?"
        found = self._reader.execute(query, (run, experience_id)).fetchone()
        places = np.flatnonzero(facts.rows["id"] == (found[0] if found else 0)).tolist()  # ids begin at 1
        return places[0] if places else None

    def choices(self, run: str) -> dict[str, list[str]]:
        """The environments, outcomes and roles of a run, to choose from, in the order in which they came."""
        found: dict[str, list[str]] = {"environment": [], "outcome": [], "role": []}
        for name, value in self._reader.execute("SELECT name, value FROM choices WHERE run = ? ORDER BY id", (run,)):
            found[name].append(value)
        return found


def _histogram(facts: RunFacts, matching: Mask, bins: int) -> list[Bin]:
    rewards = facts.rows["reward"][matching]
    return histogram(rewards[~np.isnan(rewards)], bins)


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
