"""What a disk may have after a loss of power, of events that are written out here."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from mulligan.testing.power_loss import (
    CannotRecord,
    Created,
    Disk,
    Event,
    Removed,
    Resized,
    Synced,
    Written,
    events,
    losses,
    record,
)
from tests.support.found import require_strace

OLD, NEW = b"a" * 1000, b"b" * 1000
SAVED: list[Event] = [Created("/d/f"), Synced("/d"), Written("/d/f", 0, OLD), Synced("/d/f")]


def outcomes(happened: list[Event], count: int = 400) -> list[dict[str, bytes]]:
    disk = Disk()
    for event in happened:
        disk.do(event)
    return [disk.after_loss(random.Random(seed)) for seed in range(count)]


def test_what_was_synced_stays() -> None:
    assert all(found == {"/d/f": OLD} for found in outcomes(SAVED))


def test_a_later_write_is_there_or_missing_or_there_in_part() -> None:
    found = {one["/d/f"] for one in outcomes([*SAVED, Written("/d/f", 100, NEW)])}
    sectors = [(100, 512), (512, 1024), (1024, 1100)]
    assert all(one[:100] == OLD[:100] for one in found)
    assert {OLD, OLD[:100] + NEW} <= found and len(found) > 2
    for begin, end in sectors:
        assert all(
            one[begin:end] in (NEW[begin - 100 : end - 100], (OLD + bytes(100))[begin:end], OLD[begin:end])
            for one in found
        )


def test_a_later_write_may_be_there_without_an_earlier_one() -> None:
    found = {one["/d/f"] for one in outcomes([*SAVED, Written("/d/f", 0, b"x"), Written("/d/f", 1, b"y")])}
    assert {one[:2] for one in found} == {b"aa", b"xa", b"ay", b"xy"}


def test_a_change_of_size_is_kept_or_lost() -> None:
    assert {len(one["/d/f"]) for one in outcomes([*SAVED, Resized("/d/f", 10)])} == {10, 1000}


def test_names_are_kept_when_their_folder_is_synced() -> None:
    new: list[Event] = [*SAVED, Created("/d/g"), Synced("/d/g")]
    assert {"/d/g" in one for one in outcomes(new)} == {True, False}
    assert {"/d/g" in one for one in outcomes([*new, Synced("/d")])} == {True}
    assert {"/d/f" in one for one in outcomes([*SAVED, Removed("/d/f")])} == {True, False}
    assert {"/d/f" in one for one in outcomes([*SAVED, Removed("/d/f"), Synced("/d")])} == {False}


def test_notes_are_those_of_the_moment() -> None:
    happened: list[Event] = [Created("/d/n"), *SAVED, Written("/d/n", None, b"1\n"), Written("/d/n", None, b"2\n")]
    found = list(losses(happened, Path("/d/n"), len(happened), random.Random(0)))
    assert [loss.notes for loss in found][-3:] == [[], [b"1\n"], [b"1\n", b"2\n"]]
    assert [loss.files for loss in found][-3:] == [{"f": OLD}] * 3


PROGRAM = """
import os, sys
folder = sys.argv[1]
file = os.open(folder + "/f", os.O_RDWR | os.O_CREAT)
os.pwrite(file, bytes(range(256)) * 300, 7)
os.ftruncate(file, 5000)
os.fsync(file)
os.close(file)
file = os.open(folder, os.O_RDONLY)
os.fsync(file)
file = os.open(folder + "/notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(file, b'"quoted", 1 = 2!')
os.unlink(folder + "/f")
"""


def test_a_program_is_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "a folder, (1) = 2"
    folder.mkdir()
    try:
        record([sys.executable, "-c", PROGRAM, folder], tmp_path / "trace")
    except CannotRecord as reason:
        require_strace(f"no recording to test with: {reason}")
    file, notes = f"{folder}/f", f"{folder}/notes"
    assert list(events(tmp_path / "trace", folder)) == [
        Created(file),
        Written(file, 7, bytes(range(256)) * 300),
        Resized(file, 5000),
        Synced(file),
        Synced(f"{folder}"),
        Created(notes),
        Written(notes, None, b'"quoted", 1 = 2!'),
        Removed(file),
    ]


def test_a_program_that_fails_is_told(tmp_path: Path) -> None:
    try:
        with pytest.raises(RuntimeError, match="ended with 3: no luck"):
            record([sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)"], tmp_path / "t")
    except CannotRecord as reason:
        require_strace(f"no recording to test with: {reason}")


def test_without_strace_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}")
    with pytest.raises(CannotRecord, match="strace is not installed"):
        record([sys.executable, "-c", ""], tmp_path / "t")
