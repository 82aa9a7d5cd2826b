"""Files that are whole or absent, and the lock of one."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mulligan.common.file_lock import lock_file
from mulligan.common.files import make_folder, move, move_folder, replace, temporary_file
from tests.support.small_disk import SmallDisk


def test_a_file_is_replaced_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "state"
    replace(path, b"old")
    replace(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_on_a_full_disk_the_old_file_stays_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    replace(path, b"old")
    SmallDisk(monkeypatch, 2)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        replace(path, b"newer")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_temporary_file_goes_unless_it_was_moved(tmp_path: Path) -> None:
    with temporary_file(tmp_path):
        pass
    with temporary_file(tmp_path) as kept:
        kept.write_bytes(b"kept")
        move(kept, tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_content_and_name_are_synced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    target = tmp_path / "target"

    def fsync(descriptor: int) -> None:
        seen.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), target.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    source = tmp_path / "source"
    source.write_bytes(b"x")
    move(source, target)
    assert seen == [("source", False), (tmp_path.name, True)]


def test_a_folder_is_synced_with_what_is_in_it_before_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []
    target = tmp_path / "target"

    def fsync(descriptor: int) -> None:
        seen.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), target.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    inner = tmp_path / "source" / "inner"
    inner.mkdir(parents=True)
    (inner / "file").write_bytes(b"x")
    move_folder(tmp_path / "source", target)
    assert sorted(seen[:3]) == [("file", False), ("inner", False), ("source", False)]
    assert seen[3:] == [(tmp_path.name, True)]
    assert (target / "inner" / "file").read_bytes() == b"x"


def test_the_names_of_folders_that_are_made_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
    )
    make_folder(tmp_path / "a" / "b")
    assert seen == [tmp_path.name, "a"]
    make_folder(tmp_path / "a" / "b")
    assert len(seen) == 2


def test_another_process_cannot_take_a_lock_that_is_held(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = "from mulligan.common.file_lock import lock_file; from pathlib import Path; import sys"
    command = [sys.executable, "-c", f"{program}; lock_file(Path(sys.argv[1]))", str(path)]
    with lock_file(path):
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 1 and "BlockingIOError" in refused.stderr
    assert subprocess.run(command, check=False).returncode == 0


def test_a_lock_that_cannot_be_opened_is_no_lock_that_is_held(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lock_file(tmp_path / "missing" / "lock")
