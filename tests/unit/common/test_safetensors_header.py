"""Headers of safetensors files: read as the format's own library does, and refused for any file that is not whole."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from mulligan.common.safetensors_header import BadSafetensors, read_header
from mulligan.models import EMBEDDED

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.bool: "BOOL"}
FILE = save({"a": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, {"format": "pt"})
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_names_types_and_shapes_are_those_that_were_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"x": torch.arange(6).reshape(2, 3).to(dtype), "y": torch.ones((), dtype=dtype)}
    save_file(tensors, tmp_path / "f")
    content = (tmp_path / "f").read_bytes()
    found = read_header(tmp_path / "f")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        "x": (DTYPES[dtype], (2, 3)),
        "y": (DTYPES[dtype], ()),
    }
    for name, tensor in tensors.items():
        begin, end = found[name].place
        assert content[begin:end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    save_file({}, tmp_path / "f")
    assert read_header(tmp_path / "f") == {}


def test_the_embedded_model_is_whole() -> None:
    found = read_header(EMBEDDED / "model.safetensors")["model.norm.weight"]
    assert (found.dtype, found.shape) == ("F32", (96,))


@pytest.mark.parametrize("size", range(len(FILE)))
def test_every_part_of_a_file_is_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(FILE[:size])
    with pytest.raises(BadSafetensors):
        read_header(tmp_path / "f")


def test_what_follows_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(FILE + b"x")
    with pytest.raises(BadSafetensors, match="1 bytes longer"):
        read_header(tmp_path / "f")


NUMBERS = st.integers() | st.floats() | st.text(max_size=2) | st.none()
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "X9"]) | st.none(),
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, max_size=3) | NUMBERS,
    },
)


@SHARED
@given(st.binary() | st.dictionaries(st.text(), ENTRIES | st.none()).map(lambda header: json.dumps(header).encode()))
def test_any_header_is_read_or_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header)
    try:
        found = read_header(tmp_path / "f")
    except BadSafetensors:
        return
    assert all(0 in tensor.shape or tensor.dtype == "X9" for tensor in found.values()), "there is no byte of any"


@SHARED
@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with suppress(BadSafetensors):
        assert read_header(tmp_path / "f") == {}
