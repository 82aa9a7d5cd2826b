"""Files that are written a tensor at a time are those of safetensors, to the byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mulligan.trainer.learner.tensor_files import StoredTensors, TensorStream, write

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.arange(3, dtype=torch.int64),
    "é": torch.tensor([True, False, True]),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
    "number": torch.tensor(2.5),
    "double": torch.tensor([1.0], dtype=torch.float64),
    "turned": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
    "bytes": torch.arange(7, dtype=torch.uint8),
    "halves": torch.ones(2, dtype=torch.float16),
    "whole": torch.ones(2, dtype=torch.int32),
}


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    sha256 = write(TensorStream(TENSORS), tmp_path / "ours")
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs")
    content = (tmp_path / "ours").read_bytes()
    assert content == (tmp_path / "theirs").read_bytes()
    assert sha256 == hashlib.sha256(content).hexdigest()
    assert TensorStream(TENSORS).nbytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_what_is_of_floating_point_is_converted(tmp_path: Path) -> None:
    stream = TensorStream(TENSORS, torch.bfloat16)
    size = stream.nbytes
    write(stream, tmp_path / "file")
    found = load_file(tmp_path / "file")
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
    assert size == sum(tensor.nbytes for tensor in found.values())


def test_tensors_are_read_one_by_one(tmp_path: Path) -> None:
    write(TensorStream(TENSORS), tmp_path / "file")
    stored = StoredTensors(tmp_path / "file")
    assert stored.keys() == TENSORS.keys() and len(stored) == len(TENSORS)
    assert stored.shapes == {name: list(tensor.shape) for name, tensor in TENSORS.items()}
    assert stored.described["half"] == ([5], "bfloat16")
    for name, tensor in TENSORS.items():
        assert torch.equal(stored[name], tensor)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345678")
    with pytest.raises(Exception, match="header"):
        StoredTensors(tmp_path / "file")
