"""Whose the folders of a learner's server are, and who may read what it publishes."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mulligan.trainer.learner import storage
from mulligan.trainer.learner.folders import claim
from mulligan.trainer.learner.settings import LearnerServerSettings
from mulligan.trainer.learner.tensor_files import TensorStream


@pytest.fixture
def folder() -> Iterator[Path]:
    """In a place that every user can reach, as pytest's own is not. What is made in it is its user's alone."""
    before = os.umask(0o077)
    made = Path(tempfile.mkdtemp())
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)
    os.umask(before)


def settings_of(folder: Path) -> LearnerServerSettings:
    return LearnerServerSettings(weights_folder=folder / "weights", checkpoint_folder=folder / "checkpoints")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("shared", ["weights_folder", "checkpoint_folder"])
def test_a_folder_has_one_trainer(folder: Path, shared: str) -> None:
    first = settings_of(folder / "one")
    second = replace(settings_of(folder / "two"), **{shared: getattr(first, shared)})
    with claim(first):
        with pytest.raises(OSError, match=f"^{shared}: {getattr(first, shared)} is in use by another trainer"):
            claim(second)
        claim(settings_of(folder / "two")).close()
    claim(second).close()


def test_weights_and_checkpoints_may_be_in_one_folder(folder: Path) -> None:
    claim(LearnerServerSettings(weights_folder=folder / "all", checkpoint_folder=folder / "all")).close()


def test_a_folder_that_cannot_be_made_is_named_with_its_setting(folder: Path) -> None:
    (folder / "weights").write_text("a file")
    with pytest.raises(OSError, match=r"^weights_folder: cannot use .*weights: "):
        claim(settings_of(folder))


def publish(folder: Path, *, to_group: bool) -> list[Path]:
    tensors = {"w": torch.zeros(2)}
    storage.publish_file(TensorStream(tensors), folder / "full.safetensors", to_group=to_group)

    def save(at: Path) -> None:
        (at / "adapter.safetensors").write_bytes(b"x")

    storage.publish_folder(save, folder / "adapter", ["adapter.safetensors"], to_group=to_group)
    return [folder / "full.safetensors", folder / "adapter" / "adapter.safetensors"]


def test_published_weights_are_their_users_alone(folder: Path) -> None:
    with claim(settings_of(folder)):
        files = publish(folder / "weights", to_group=False)
    assert {mode(path) for path in files} == {0o600}
    assert {mode(folder / "weights"), mode(folder / "weights" / "adapter")} == {0o700}


def test_the_folders_group_may_read_published_weights_where_that_is_set(folder: Path) -> None:
    with claim(replace(settings_of(folder), weights_access="group")):
        files = publish(folder / "weights", to_group=True)
    assert {mode(path) for path in files} == {0o640}
    assert {mode(folder / "weights"), mode(folder / "weights" / "adapter")} == {0o2750}
    assert mode(folder / "checkpoints") == 0o700


def test_a_place_that_the_group_cannot_reach_is_named(folder: Path) -> None:
    closed = folder / "closed"
    with pytest.raises(OSError, match=rf"^weights_access: the group of .* cannot enter {closed} \(mode 0700\): chmod"):
        claim(replace(settings_of(closed), weights_access="group"))
    closed.chmod(0o710)
    claim(replace(settings_of(closed), weights_access="group")).close()
