"""Full disks and losses of power, as they strike processes that know nothing of it."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from mulligan.testing.judge import disks
from mulligan.testing.power_loss import CannotRecord, recorder
from tests.support.found import require_strace
from tests.support.waiting import wait_until

# What a service does with its files, and that it then waits to be killed.
WRITES = """
import os, sys, time
from pathlib import Path
from mulligan.common.files import make_folder, replace
from mulligan.testing.judge.disks import copy_what_is_synced
copies, folder = map(Path, sys.argv[1:])
copy_what_is_synced(copies, folder)
make_folder(folder / "run")
replace(folder / "run" / "state.json", b"old")
(folder / "before").write_bytes(b"changed")
with open(folder / "run" / "log", "ab", buffering=0) as log:
    log.write(b"one ")
    os.fsync(log.fileno())
    replace(folder / "run" / "other", b"its folder is synced")
    log.write(b"two ")
(folder / "run" / "new").write_bytes(b"not synced")
os.rename(folder / "run" / "state.json", folder / "run" / "renamed")
(folder / "ready").touch()
time.sleep(60)
"""


def test_what_was_not_synced_is_gone(tmp_path: Path) -> None:
    folder, copies = tmp_path / "data", tmp_path / "copies"
    folder.mkdir()
    (folder / "before").write_bytes(b"before")
    process = subprocess.Popen([sys.executable, "-c", WRITES, copies, folder])
    wait_until((folder / "ready").exists)
    process.kill()
    process.wait()
    lost = disks.lose_what_is_not_synced(copies, folder)
    left = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert left == {
        "before": b"before",
        "run/state.json": b"old",
        "run/log": b"one ",
        "run/other": b"its folder is synced",
    }
    assert lost == 5, "before, log, new, renamed, ready"


def test_a_process_whose_files_may_not_grow_is_told_so(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
for line in sys.stdin:
    try:
        Path({str(tmp_path / "file")!r}).write_bytes(b"x" * 100)
        print("written", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None

    def asked() -> str:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    assert asked() == "written"
    with disks.files_may_not_grow(process.pid):
        assert asked() == "File too large"
    assert asked() == "written"
    process.stdin.close()
    process.stdout.close()
    assert process.wait() == 0


SQLITE = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA journal_mode = WAL")
database.execute("PRAGMA synchronous = FULL")
database.execute("CREATE TABLE IF NOT EXISTS kept (number INTEGER)")
for number, line in enumerate(sys.stdin):
    try:
        database.execute("INSERT INTO kept VALUES (?)", (number,))
        print(number, flush=True)
    except sqlite3.OperationalError as error:
        print(error, flush=True)
"""


class Database:
    def __init__(self, path: Path, before: list[str]):
        self.process = subprocess.Popen(
            [*before, sys.executable, "-c", SQLITE, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def insert(self) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture
def traced(tmp_path: Path) -> list[str]:
    problem, command = "", list[str]()
    try:
        command = recorder(tmp_path / "trace")
    except CannotRecord as error:
        problem = str(error)
    require_strace(problem)
    return command


@pytest.mark.usefixtures("traced")
def test_a_database_without_room_is_told_so(tmp_path: Path) -> None:
    database = Database(tmp_path / "kept.db", [])
    assert database.insert() == "0"
    with disks.database_is_full(database.process.pid, tmp_path / "note"):
        assert database.insert() == "database or disk is full"
    assert database.insert() == "2"
    database.end()


def test_a_database_keeps_what_it_acknowledged_over_a_loss_of_power(tmp_path: Path, traced: list[str]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / "kept.db"
    first = Database(path, [])
    assert first.insert() == "0"
    first.end()
    before = disks.files_of(folder)
    second = Database(path, traced)
    assert [second.insert() for _ in range(3)] == ["0", "1", "2"]
    second.end()
    disks.lose_power_of_database(folder, before, tmp_path / "trace", random.Random(0))
    left = sqlite3.connect(path)
    assert left.execute("SELECT COUNT(*) FROM kept").fetchall() == [(4,)]
    left.close()
    (tmp_path / "trace").write_text("")  # a disk that did nothing since the begin
    disks.lose_power_of_database(folder, before, tmp_path / "trace", random.Random(0))
    left = sqlite3.connect(path)
    assert left.execute("SELECT COUNT(*) FROM kept").fetchall() == [(1,)]
    left.close()
