"""Reads and checks the header of a safetensors file, without torch: its tensors, and whether the file is complete.

The format: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # bytes, as in the format's own library
# Bits of a value, by the name of its type in the format. A type that is missing here is not checked against its shape.
_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}


class BadSafetensors(Exception):
    """The file is incomplete, or not a safetensors file. The message does not contain its name."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor. `dtype` is a name of the format: F32, BF16, …; `place`, where its bytes begin and end in the file."""

    dtype: str
    shape: tuple[int, ...]
    place: tuple[int, int]


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Returns the tensors of a file, by name. Raises BadSafetensors and OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size <= _LENGTH_BYTES or length > _LONGEST_HEADER:
            raise BadSafetensors("not a safetensors file")
        if _LENGTH_BYTES + length > size:
            raise _cut(size, _LENGTH_BYTES + length)
        header = _json(file.read(length))
    begin = _LENGTH_BYTES + length
    tensors = {name: _entry(name, value, begin) for name, value in header.items() if name != "__metadata__"}
    end = max((tensor.place[1] for tensor in tensors.values()), default=begin)
    if end > size:
        raise _cut(size, end)
    if end < size:
        raise BadSafetensors(f"{size - end} bytes longer than its header describes")
    return tensors


def _json(text: bytes) -> Mapping[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise BadSafetensors("not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise BadSafetensors("not a safetensors file: its header is not a JSON object")
    return header


def _entry(name: str, value: Any, start: int) -> TensorHeader:
    """`start` is where the bytes of all tensors begin in the file."""
    try:
        dtype, shape, (begin, end) = (
            str(value["dtype"]),
            tuple(map(int, value["shape"])),
            map(int, value["data_offsets"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        raise BadSafetensors(f"not a safetensors file: its header gives no valid place for {name}") from None
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise BadSafetensors(f"damaged: the header's place of {name} is invalid")
    if dtype in _BITS and 8 * (end - begin) != prod(shape) * _BITS[dtype]:
        raise BadSafetensors(
            f"damaged: {name} has {end - begin} bytes, which does not match {dtype} of shape {list(shape)}"
        )
    return TensorHeader(dtype, shape, (start + begin, start + end))


def _cut(size: int, expected: int) -> BadSafetensors:
    return BadSafetensors(f"cut off: {size} bytes, but its header needs at least {expected}; download it again")
