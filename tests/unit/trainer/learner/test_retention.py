"""What a learner keeps on disk, whatever the times of files say; and a disk that is full."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.learner import storage
from mulligan.trainer.learner.tensor_files import TensorStream, write
from mulligan.trainer.settings import LoraSettings
from tests.support.learning import FULL, LORA, learn, make, weights_digest
from tests.support.tiny_model import write_tiny_model
from tests.unit.trainer.learner.test_storage import path_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def age(folder: Path, seconds: int) -> None:
    """Makes all below it as if it had been written that long ago, or will be."""
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (time.time() - seconds,) * 2)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("direction", [-1, 1])
def test_checkpoints_are_kept_by_step_whatever_their_times_say(tiny: Path, tmp_path: Path, direction: int) -> None:
    """The clock is set back, or a file system has a clock of its own."""
    learner = make(tiny, tmp_path, keep_checkpoints=3)
    root = tmp_path / "checkpoints" / "learner"
    for step in range(8, 13):
        learn(learner, range(step, step + 1))
        learner.save_checkpoint(f"run-{step}")
        age(root / f"run-{step}", direction * 1000 * step)
    assert kept(root) == ["run-10", "run-11", "run-12"]


def test_a_copied_folder_takes_no_checkpoints_place(tiny: Path, tmp_path: Path) -> None:
    learner = make(tiny, tmp_path, keep_checkpoints=2)
    root = tmp_path / "checkpoints" / "learner"
    learn(learner, range(1))
    learner.save_checkpoint("run-1")
    for name in ("run-1 (copy)", ".run-1"):
        shutil.copytree(root / "run-1", root / name)
    for step in range(2, 5):
        learner.save_checkpoint(f"run-{step}")
    assert kept(root) == [".run-1", "run-1 (copy)", "run-3", "run-4"]


def test_checkpoints_of_equal_weights_are_kept_by_name(tiny: Path, tmp_path: Path) -> None:
    learner = make(tiny, tmp_path, keep_checkpoints=3)
    root = tmp_path / "checkpoints" / "learner"
    for step in range(7, 12):
        learner.save_checkpoint(f"run-{step}")
        age(root / f"run-{step}", 1000 * step)
    assert kept(root) == ["run-10", "run-11", "run-9"]


def test_the_checkpoint_that_a_learner_goes_on_from_stays_until_the_next_but_one_is_saved(
    tiny: Path, tmp_path: Path
) -> None:
    """A run notes a checkpoint after it is saved. One that fell in between resumes before what it had saved."""
    learner = make(tiny, tmp_path, keep_checkpoints=2)
    root = tmp_path / "checkpoints" / "learner"
    for step in range(1, 4):
        learn(learner, range(step, step + 1))
        learner.save_checkpoint(f"run-{step}")
    resumed = make(tiny, tmp_path, keep_checkpoints=2)
    resumed.load_checkpoint("run-2")
    resumed.save_checkpoint("stopped")
    assert {"run-2", "stopped"} <= set(kept(root)), "on record, and about to be"
    for step in range(3, 5):
        learn(resumed, range(step, step + 1))
        resumed.save_checkpoint(f"run-{step}")
    assert kept(root) == ["run-3", "run-4"]


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_published_weights_are_kept_by_version_whatever_their_times_say(
    tiny: Path, tmp_path: Path, lora: LoraSettings | None
) -> None:
    learner = make(tiny, tmp_path, lora)
    for version in (1, 2, 9, 10, 11):
        path = path_of(learner.publish_weights(version))
        os.utime(path, (time.time() - 1000 * version,) * 2)
    names = [f"learner-v{version:06d}" for version in (9, 10, 11)]
    assert [name.removesuffix(".safetensors") for name in kept(tmp_path / "weights")] == names
    again = make(tiny, tmp_path, lora)  # of a policy that forgot its versions: it counts from the start
    for version in (1, 2, 3):
        again.publish_weights(version)
    expected = [f"learner-v{version:06d}" for version in (2, 3, 9, 10, 11)]
    assert [name.removesuffix(".safetensors") for name in kept(tmp_path / "weights")] == expected


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_a_version_that_is_asked_to_stay_stays_while_it_is(
    tiny: Path, tmp_path: Path, lora: LoraSettings | None
) -> None:
    """What an evaluation beside training measures. A learner of a later process is asked, too."""

    def versions() -> list[int]:
        return [int(name.removesuffix(".safetensors").rpartition("-v")[2]) for name in kept(tmp_path / "weights")]

    learner = make(tiny, tmp_path, lora)
    measured = path_of(learner.publish_weights(1))
    for version in range(2, 6):
        learner.publish_weights(version, [1])
    assert versions() == [1, 3, 4, 5]
    again = make(tiny, tmp_path, lora)
    again.publish_weights(6, [1, 99])
    assert versions() == [1, 4, 5, 6] and measured.exists()
    again.publish_weights(7)
    assert versions() == [5, 6, 7]


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_of_rust() -> Exception:
    return SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")


@pytest.mark.parametrize("writes", [1, 2, 3])
def test_a_full_disk_is_told_and_leaves_the_checkpoints_that_are_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    learner = make(tiny, tmp_path)
    learn(learner, range(1))
    learner.save_checkpoint("one")
    before = weights_digest(learner)
    root = tmp_path / "checkpoints" / "learner"
    files = {path: path.read_bytes() for path in (root / "one").iterdir()}
    learn(learner, range(1, 2))
    for name in ("one", "two"):
        done = iter(range(1, 10))

        def save(tensors: TensorStream, path: Path, done: Iterator[int] = done) -> str:
            if next(done) == writes:
                path.write_bytes(b"half")
                raise no_space()
            return write(tensors, path)

        monkeypatch.setattr(storage, "write", save)
        with pytest.raises(DomainError, match=f"the disk of {root / name} is full") as caught:
            learner.save_checkpoint(name)
        assert caught.value.reason is Reason.DISK_FULL
        assert caught.value.metadata["folder"] == str(root / name) and int(caught.value.metadata["needed_bytes"]) > 0
        monkeypatch.undo()
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == files
    assert kept(root) == ["one"]
    learner.save_checkpoint("two")
    learner.load_checkpoint("one")
    assert weights_digest(learner) == before


@pytest.mark.parametrize("failure", [no_space, no_space_of_rust])
@pytest.mark.parametrize("lora", [FULL, LORA])
def test_weights_that_find_no_room_are_not_published(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lora: LoraSettings | None,
    failure: Callable[[], Exception],
) -> None:
    learner = make(tiny, tmp_path, lora)
    learner.publish_weights(1)
    before = kept(tmp_path / "weights")

    def fails(descriptor: int) -> None:
        raise failure()

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(DomainError, match=f"the disk of {tmp_path / 'weights'} is full"):
        learner.publish_weights(2)
    assert kept(tmp_path / "weights") == before
    monkeypatch.undo()
    learner.publish_weights(2)
