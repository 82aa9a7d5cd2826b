"""The records of versions: damage costs the version that it touches, and is told."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import VersionState, WeightsKind
from mulligan.policy.version_table import VersionRecord, VersionTable
from tests.support.damage import flips
from tests.support.version_records import record_of

STATES = (VersionState.REMOVED, VersionState.WITHDRAWN, VersionState.KEPT, VersionState.KEPT, VersionState.SERVING)
RECORDS = tuple(
    record_of(number, 0, b"%d" % number if number else None).now(state=state) for number, state in enumerate(STATES)
)
SERVING = RECORDS[-1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "versions.db"
    table = VersionTable(path)
    with table.transaction():
        for record in RECORDS:
            table.put(record)
    table.close()
    return path


@pytest.fixture
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    db = sqlite3.connect(path, isolation_level=None)
    yield db
    db.close()


def all_of(table: VersionTable) -> list[VersionRecord]:
    return table.records("ORDER BY policy_version")


def opened(path: Path) -> tuple[VersionTable | None, str]:
    try:
        return VersionTable(path), ""
    except (OSError, DomainError) as error:
        return None, str(error)


def test_records_come_back_and_have_checksums(path: Path, raw: sqlite3.Connection) -> None:
    table = VersionTable(path)
    assert all_of(table) == list(RECORDS)
    assert [table.get(number) for number in range(6)] == [*RECORDS, None]
    table.close()
    assert None not in {crc for (crc,) in raw.execute("SELECT crc FROM records")}


def test_each_single_bit_is_as_written_or_told(path: Path) -> None:
    content = path.read_bytes()
    written = {record.number: record for record in RECORDS}
    outcomes = {"same": 0, "lost": 0, "refused": 0}
    for place, flipped in flips(content, 120):
        path.write_bytes(flipped)
        with capture_logs() as logs:
            table, problem = opened(path)
            if table is None:
                assert "versions.db" in problem, place
                outcomes["refused"] += 1
                continue
            found = {record.number: record for record in all_of(table)}
            table.close()
        lost = [number for number, record in found.items() if record.is_lost]
        told = [entry["policy_version"] for entry in logs if entry["event"].startswith("the record of a version")]
        assert told == lost, place
        promoted = {number: record.now(state=VersionState.SERVING) for number, record in written.items()}
        for number, record in found.items():
            assert number in lost or record in (written[number], promoted[number]), place
        assert lost or found == written, place
        assert len(found) >= len(written), f"{place}: a record is gone"
        outcomes["lost" if lost else "same"] += 1
    assert min(outcomes.values()) > 2, outcomes


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("kind", "originam"),
        ("source", "transformers:other"),
        ("sha256", "0" * 64),
        ("created_at", "not a time"),
        ("canary", "[[[1], [2]]]"),
        ("canary_difference", 0.5),
        ("origin", 3),
        ("crc", None),
        ("crc", 5),
        ("setup", b"\xff\xfe"),
    ],
)
def test_a_damaged_record_costs_its_version_and_the_newest_kept_one_serves(
    path: Path, raw: sqlite3.Connection, column: str, value: object
) -> None:
    raw.execute(f"UPDATE records SET {column} = ? WHERE policy_version = 4", (value,))
    before = path.read_bytes()
    with capture_logs() as logs:
        table = VersionTable(path)
    assert [entry.get("policy_version") for entry in logs] == [4, 3]
    assert {entry["file"] for entry in logs} == {str(path)}
    lost = table.get(4)
    assert lost is not None and lost.is_lost and lost.version.state is VersionState.REMOVED
    assert lost.version.problem == "its record in versions.db was damaged: what it said is lost"
    assert table.get(3) == RECORDS[3].now(state=VersionState.SERVING)
    assert all_of(table)[:3] == list(RECORDS[:3])
    assert table.greatest() == 4, "the number is not used again"
    table.close()
    assert path.with_name("versions.db.damaged").read_bytes() == before
    with capture_logs() as logs:
        VersionTable(path).close()
    assert logs == [], "it was mended"


def test_an_old_record_that_is_damaged_leaves_the_one_that_serves(path: Path, raw: sqlite3.Connection) -> None:
    raw.execute("UPDATE records SET model = 'n' WHERE policy_version = 2")
    table = VersionTable(path)
    assert all_of(table)[3:] == list(RECORDS[3:])
    assert [record.number for record in all_of(table) if record.is_lost] == [2]
    table.close()


def test_what_is_damaged_while_the_table_is_open_is_refused_by_name(path: Path, raw: sqlite3.Connection) -> None:
    table = VersionTable(path)
    raw.execute("UPDATE records SET fingerprint = 'g' WHERE policy_version = 3")
    with pytest.raises(DomainError, match=r"the record of version 3 in .*versions\.db is damaged") as caught:
        table.get(3)
    assert caught.value.reason is Reason.STATE_DAMAGED
    assert caught.value.metadata["file"] == str(path)
    with capture_logs() as logs:
        assert [record.number for record in all_of(table)] == [0, 1, 2, 4]
    assert logs == [], "it was told already"
    assert list(table.with_files()) == [2, 3, 4], "its files stay"
    with table.transaction():
        table.change("WHERE state = 'kept'", state="removed", canary="[]")
    with pytest.raises(DomainError, match="version 3"):
        table.get(3)
    table.close()


def test_damaged_pages_are_told_as_such(path: Path, raw: sqlite3.Connection) -> None:
    content = path.read_bytes()
    [(page,)] = raw.execute("SELECT rootpage FROM sqlite_master WHERE name = 'records'")
    path.write_bytes(content[: (page - 1) * 4096] + bytes(4096) + content[page * 4096 :])
    with pytest.raises((OSError, DomainError), match=r"versions\.db.*damaged|cannot use .*versions\.db"):
        VersionTable(path)
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(OSError, match=r"cannot use .*versions\.db: file is not a database\. Put a copy"):
        VersionTable(path)


def test_a_damaged_index_is_made_anew(path: Path, raw: sqlite3.Connection) -> None:
    [(page,)] = raw.execute("SELECT rootpage FROM sqlite_master WHERE name = 'one_serves'")
    content = bytearray(path.read_bytes())
    place = content.index(b"serving", (page - 1) * 4096)
    content[place] ^= 1
    path.write_bytes(content)
    with capture_logs() as logs:
        table = VersionTable(path)
    assert [entry["event"] for entry in logs] == ["damaged indexes of a database were made anew"]
    assert table.records("WHERE state = 'serving'") == [SERVING]
    table.close()


OLD = """CREATE TABLE versions (
    policy_version INTEGER PRIMARY KEY, origin INTEGER NOT NULL, source TEXT NOT NULL, setup TEXT NOT NULL,
    kind TEXT NOT NULL, state TEXT NOT NULL, sha256 TEXT NOT NULL, fingerprint TEXT NOT NULL, created_at TEXT NOT NULL,
    problem TEXT NOT NULL, canary_difference REAL, engine_checksum TEXT NOT NULL, model TEXT NOT NULL,
    canary TEXT NOT NULL
);
CREATE UNIQUE INDEX one_serves ON versions (state) WHERE state = 'serving';
CREATE INDEX of_a_model ON versions (origin);
PRAGMA user_version = 1;
"""


def test_a_table_without_checksums_gets_them(path: Path, raw: sqlite3.Connection, tmp_path: Path) -> None:
    rows = [row[:-1] for row in raw.execute("SELECT * FROM records")]
    old = tmp_path / "old" / "versions.db"
    old.parent.mkdir()
    with sqlite3.connect(old) as db:
        db.executescript(OLD)
        db.executemany(f"INSERT INTO versions VALUES ({', '.join('?' * 14)})", rows)
    db.close()
    for _ in range(2):
        table = VersionTable(old)
        assert all_of(table) == list(RECORDS)
        table.close()


def test_a_table_of_a_newer_release_is_left_alone(path: Path, raw: sqlite3.Connection) -> None:
    raw.execute("PRAGMA user_version = 3")
    with pytest.raises(OSError, match="has schema 3, and this program knows schemas up to 2"):
        VersionTable(path)


def test_nothing_but_a_lost_record_looks_like_one() -> None:
    original = record_of(0, 0, None)
    assert not original.is_lost and not SERVING.is_lost
    assert replace(original, version=replace(original.version, kind=WeightsKind.FULL)).is_lost
