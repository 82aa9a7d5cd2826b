"""The versions of a policy on disk: whatever happens to them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import CanaryProbe, VersionState, WeightsKind
from mulligan.policy.backend import WeightsFile
from mulligan.policy.version_table import VersionRecord
from mulligan.policy.versions import VersionStore
from tests.support.effort import examples
from tests.support.version_records import PROBES, record_of, staged

KEEP = 2


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VersionStore]:
    store = VersionStore(tmp_path / "store", KEEP)
    yield store
    store.close()


def test_a_record_comes_back_as_it_was(store: VersionStore, tmp_path: Path) -> None:
    store.begin(record_of(0, 0, None))
    staged(store, tmp_path, 4, b"four")
    record = record_of(4, 0, b"four").now(canary_difference=0.25, engine_checksum="c", problem="p")
    store.serve(record)
    assert store.get(4) == record == store.serving()
    assert store.get(5) is None
    assert store.next_version() == 5
    assert [version.policy_version for version in store.versions(None, 10)] == [4, 0]
    assert [version.policy_version for version in store.versions(4, 10)] == [0]
    assert [version.policy_version for version in store.versions(None, 1)] == [4]


def test_a_file_is_linked_and_outlives_the_senders(store: VersionStore, tmp_path: Path) -> None:
    store.begin(record_of(0, 0, None))
    file = staged(store, tmp_path, 1, b"one")
    published = tmp_path / "1.published"
    assert file.path is not None and file.path.samefile(published)
    store.serve(record_of(1, 0, b"one"))
    published.unlink()
    record = store.serving()
    assert record is not None
    assert store.file(record) == WeightsFile(file.path, WeightsKind.FULL, 1, record.version.sha256, PROBES)


def test_the_base_of_a_sparse_file_is_found_by_its_checksum_while_it_is_kept(
    store: VersionStore, tmp_path: Path
) -> None:
    def sha256(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    store.begin(record_of(0, 0, None))
    contents = [b"one", b"two", b"two", b"three"]
    for number, content in enumerate(contents[:-1], 1):
        staged(store, tmp_path, number, content)
        store.serve(record_of(number, 0, content))
    with store.open_full(sha256(b"two")) as found:
        staged(store, tmp_path, 4, contents[-1])
        store.serve(record_of(4, 0, contents[-1]))
        (tmp_path / "2.published").unlink()
        assert found.read() == b"two", "it was opened before it was removed"
    with store.open_full(sha256(b"two")) as found:  # of version 3
        assert found.read() == b"two"
    staged(store, tmp_path, 5, b"five")  # not checked yet
    for missing in (sha256(b"one"), sha256(b"five"), "", "0" * 64):
        with pytest.raises(DomainError, match="no version of full weights") as caught:
            store.open_full(missing)
        assert caught.value.reason is Reason.VERSION_NOT_KEPT


def test_a_file_that_its_writer_changes_is_noticed(store: VersionStore, tmp_path: Path) -> None:
    store.begin(record_of(0, 0, None))
    staged(store, tmp_path, 1, b"one")
    store.serve(record_of(1, 0, b"one"))
    (tmp_path / "1.published").write_bytes(b"uno")
    with pytest.raises(DomainError) as caught:
        store.file(record_of(1, 0, b"one"))
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH


def test_where_links_are_impossible_it_copies(
    store: VersionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    store.begin(record_of(0, 0, None))
    file = staged(store, tmp_path, 1, b"one")
    assert file.path is not None and not file.path.samefile(tmp_path / "1.published")
    assert file.path.read_bytes() == b"one"


def test_of_an_adapter_two_files_are_taken_and_the_settings_are_copied(store: VersionStore, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, content in {"adapter_model.safetensors": b"x", "adapter_config.json": b"{}", "evil.bin": b"p"}.items():
        (folder / name).write_bytes(content)
    checksum = hashlib.sha256(b"x").hexdigest()
    file = store.stage(WeightsFile(folder, WeightsKind.LORA, 1, checksum))
    assert file.path is not None
    assert sorted(path.name for path in file.path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (file.path / "adapter_model.safetensors").samefile(folder / "adapter_model.safetensors")
    assert not (file.path / "adapter_config.json").samefile(folder / "adapter_config.json")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(DomainError) as caught:
        store.stage(WeightsFile(folder, WeightsKind.LORA, 2, checksum))
    assert caught.value.reason is Reason.WEIGHTS_NOT_FOUND
    assert not (file.path.parent / "2").exists()


def test_a_folder_has_one_process(store: VersionStore, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"state_folder: .* is in use by another process"):
        VersionStore(tmp_path / "store", KEEP)


def test_a_temporary_folder_is_gone_at_the_end() -> None:
    store = VersionStore(None, KEEP)
    with tempfile.TemporaryDirectory() as folder:
        file = staged(store, Path(folder), 1, b"one")
    assert file.path is not None and file.path.exists()
    store.close()
    assert not file.path.exists()


def test_a_model_keeps_its_number_over_a_restart_and_another_gets_the_next(tmp_path: Path) -> None:
    store = VersionStore(tmp_path / "store", KEEP)
    assert store.first_version("transformers:m") == 0
    store.begin(record_of(0, 0, None))
    staged(store, tmp_path, 3, b"three")
    store.serve(record_of(3, 0, b"three"))
    assert store.first_version("transformers:m") == 0
    assert store.first_version("sglang:m") == 4
    store.begin(record_of(4, 4, None))
    kept = tmp_path / "store" / "files" / "3"
    assert kept.exists(), "the model that was replaced finishes its sessions"
    store.end(0)
    assert not kept.exists()
    states = {version.policy_version: version.state for version in store.versions(None, 10)}
    assert states == {0: VersionState.REMOVED, 3: VersionState.REMOVED, 4: VersionState.SERVING}
    store.close()


def test_a_model_that_is_closed_takes_no_file_of_an_update_under_way(store: VersionStore, tmp_path: Path) -> None:
    store.begin(record_of(0, 0, None))
    store.begin(record_of(1, 1, None))
    file = staged(store, tmp_path, 2, b"two")
    store.end(0)
    record = record_of(2, 1, b"two")
    store.serve(record)
    assert store.file(record) == file
    staged(store, tmp_path, 3, b"three")
    store.discard(3)
    assert [path.name for path in (tmp_path / "store" / "files").iterdir()] == ["2"]


class Versions(RuleBasedStateMachine):
    """Any sequence of updates, refusals, rollbacks, other models and restarts, against what should be known."""

    @initialize()
    def begin(self) -> None:
        self.root = tempfile.TemporaryDirectory()
        self.folder = Path(self.root.name)
        self.store = VersionStore(self.folder / "store", KEEP)
        self.states: dict[int, VersionState] = {0: VersionState.SERVING}
        self.contents: dict[int, bytes | None] = {0: None}
        self.origin = self.serving = 0
        self.store.begin(record_of(0, 0, None))

    def teardown(self) -> None:
        self.store.close()
        self.root.cleanup()

    def next_version(self, gap: int) -> int:
        return max(self.states) + gap

    def record(self, number: int) -> VersionRecord:
        return record_of(number, self.origin, self.contents[number])

    def kept(self) -> list[int]:
        return sorted(number for number, state in self.states.items() if state is VersionState.KEPT)

    @rule(gap=st.integers(1, 3), content=st.binary(max_size=4))
    def update(self, gap: int, content: bytes) -> None:
        number = self.next_version(gap)
        staged(self.store, self.folder, number, content)
        self.contents[number] = content
        self.store.serve(self.record(number))
        self.states[self.serving] = VersionState.KEPT
        self.states[number] = VersionState.SERVING
        self.serving = number
        files = [old for old in self.kept() if self.contents[old] is not None]
        for old in files[: max(0, len(files) - (KEEP - 1))]:
            self.states[old] = VersionState.REMOVED

    @rule(content=st.binary(max_size=4))
    def refuse(self, content: bytes) -> None:
        number = self.next_version(1)
        staged(self.store, self.folder, number, content)
        self.contents[number] = content
        self.store.refuse(self.record(number).now(problem="bad"))
        self.states[number] = VersionState.REFUSED

    @rule(content=st.binary(max_size=4))
    def stage_and_no_more(self, content: bytes) -> None:
        staged(self.store, self.folder, self.next_version(1), content)
        self.restart()

    @precondition(lambda self: self.kept())
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        older = [number for number in self.kept() if number < self.serving]
        if not older:
            return
        number = data.draw(st.sampled_from(older))
        self.store.serve(self.record(number), withdrawn=f"rolled back to {number}")
        for later, state in self.states.items():
            if later > number and later > self.origin and state is not VersionState.REFUSED:
                self.states[later] = VersionState.WITHDRAWN
        self.states[number] = VersionState.SERVING
        self.serving = number

    @rule()
    def load_another_model(self) -> None:
        before = self.origin
        number = self.store.next_version()
        self.contents[number] = None
        self.store.begin(record_of(number, number, None))
        self.store.end(before)
        for old, state in self.states.items():
            if state in (VersionState.SERVING, VersionState.KEPT):
                self.states[old] = VersionState.REMOVED
        self.states[number] = VersionState.SERVING
        self.origin = number
        self.serving = number

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = VersionStore(self.folder / "store", KEEP)
        assert self.store.first_version("transformers:m") == self.origin

    @invariant()
    def all_is_known_and_what_is_kept_is_there(self) -> None:
        versions = self.store.versions(None, 1000)
        assert {version.policy_version: version.state for version in versions} == self.states
        record = self.store.serving()
        assert record is not None and record.number == self.serving
        assert self.store.next_version() == max(self.states) + 1
        for number, state in self.states.items():
            if state in (VersionState.SERVING, VersionState.KEPT):
                record = self.store.get(number)
                assert record is not None
                file = self.store.file(record)  # verifies it
                assert (file.path is None) == (self.contents[number] is None)
                assert record.canary == (() if self.contents[number] is None else PROBES)
        on_disk = {int(path.name) for path in (self.folder / "store" / "files").iterdir()}
        files = [number for number, state in self.states.items() if state in (VersionState.SERVING, VersionState.KEPT)]
        assert on_disk == {number for number in files if self.contents[number] is not None}
        assert len(on_disk) <= KEEP


TestVersions = Versions.TestCase
TestVersions.settings = settings(
    max_examples=examples(40), stateful_step_count=15, suppress_health_check=list(HealthCheck)
)


def test_a_state_folder_that_was_removed_is_told(store: VersionStore, tmp_path: Path) -> None:
    store.begin(record_of(0, 0, None))
    (tmp_path / "store" / "versions.db").unlink()
    with pytest.raises(DomainError) as caught:
        store.serve(record_of(1, 0, b"one"))
    assert caught.value.reason is Reason.FOLDER_REMOVED
    assert caught.value.metadata == {"folder": str(tmp_path / "store")}
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(DomainError) as caught:
        staged(store, tmp_path, 1, b"one")
    assert caught.value.reason is Reason.FOLDER_REMOVED


def test_a_full_disk_is_told_and_the_version_before_serves(
    store: VersionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's limit of pages is what a full disk is to it; a file that cannot be linked is copied."""
    store.begin(record_of(0, 0, None))
    staged(store, tmp_path, 1, b"one")
    store.serve(record_of(1, 0, b"one"))
    [(pages,)] = store._table._db.execute("PRAGMA page_count").fetchall()
    store._table._db.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    probes = (CanaryProbe(tuple(range(50_000)), (-0.5,) * 49_999),)
    staged(store, tmp_path, 2, b"two")
    with pytest.raises(DomainError, match=f"the disk of {tmp_path / 'store'} is full") as caught:
        store.serve(replace(record_of(2, 0, b"two"), canary=probes))
    assert caught.value.reason is Reason.DISK_FULL
    assert store.serving() == record_of(1, 0, b"one") and store.get(2) is None

    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(DomainError, match=f"the disk of {tmp_path / 'store'} is full"):
        staged(store, tmp_path, 3, b"three")
    assert not (tmp_path / "store" / "files" / "3").exists()


@pytest.mark.parametrize("direction", [-1, 1])
def test_versions_are_kept_by_number_whatever_their_times_say(
    store: VersionStore, tmp_path: Path, direction: int
) -> None:
    store.begin(record_of(0, 0, None))
    for number in range(1, 6):
        staged(store, tmp_path, number, b"%d" % number)
        store.serve(record_of(number, 0, b"%d" % number))
        folder = tmp_path / "store" / "files" / str(number)
        for path in (folder, *folder.iterdir()):
            os.utime(path, (1e9 + direction * 1e6 * number,) * 2)
    assert sorted(path.name for path in (tmp_path / "store" / "files").iterdir()) == ["4", "5"]
