"""Sparse weights files: what a safetensors file has that an earlier one, its base, does not have.

A training step often moves a weight by less than bfloat16 resolves, so most published values are those of the version
before (docs/proof/benchmarks.md). A sparse file is a safetensors file, too. For each tensor NAME of which something
changed it has

    NAME.positions    [n] ascending indices into the flattened tensor: I32, or I64 if it has more than 2**31 values
    NAME.values       [n] the new values, in the type of the tensor

The values overwrite those of the base; nothing is added up. So writing them twice is as good as once. Whether the base
was the right one is told by the checksum of the whole file. The policy service's contract has the format in
PolicyAdminService.UploadWeights.

Values are compared and copied as bits, because numpy has no bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mulligan.common.errors import DomainError, Reason
from mulligan.common.safetensors_header import BadSafetensors, TensorHeader, read_header

Bits = NDArray[Any]
_BITS: dict[int, np.dtype[Any]] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}  # by bytes of a value
_POSITIONS: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
_AT_ONCE = 2**24  # values at once
_PIECE_BYTES = 2 * 2**20
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class SparseFile:
    """The sparse file that makes `whole` of its base. `changed` has the positions of each tensor in which something
    changed. They stay in memory; values are read from `whole` when `pieces` comes to them."""

    whole: Path
    tensors: dict[str, TensorHeader]
    changed: dict[str, Bits]

    @classmethod
    def between(cls, base: Path, whole: Path) -> SparseFile | None:
        """None if the two have no sparse file that is smaller than `whole`: too much changed, they have other tensors,
        or one of them is gone or damaged."""
        try:
            tensors = read_header(whole)
            if tensors != read_header(base) or not all(map(_has_bits, tensors.values())):
                return None
            before, after = _content(base), _content(whole)
            pairs = {name: (_values(before, tensor), _values(after, tensor)) for name, tensor in tensors.items()}
            room = len(after)
            for pair in pairs.values():  # first, so that nothing is kept of what is too much
                for _, differ in _compared(*pair):
                    room -= int(np.count_nonzero(differ)) * (_position_type(pair[1]).itemsize + pair[1].itemsize)
                    if room <= 0:
                        return None
            changed = {name: _differences(*pair) for name, pair in pairs.items()}
        except (OSError, BadSafetensors):
            return None
        return cls(whole, tensors, {name: positions for name, positions in changed.items() if len(positions)})

    @property
    def size_bytes(self) -> int:
        return len(self._header()) + sum(len(self.changed[name]) * size for name, _, _, size in self._parts())

    def pieces(self) -> Iterator[bytes]:
        """Its content, at most 2 MiB at a time. Raises OSError."""
        content = _content(self.whole)
        header = self._header()
        for begin in range(0, len(header), _PIECE_BYTES):
            yield header[begin : begin + _PIECE_BYTES]
        for name, what, _, size in self._parts():
            positions = self.changed[name]
            values = positions if what == "positions" else _values(content, self.tensors[name])
            for begin in range(0, len(positions), _PIECE_BYTES // size):
                part = slice(begin, begin + _PIECE_BYTES // size)
                yield (positions[part] if what == "positions" else values[positions[part]]).tobytes()

    def _parts(self) -> list[tuple[str, str, str, int]]:
        """The tensors of the file: of which tensor, what, type, and bytes of an item. Large items come first, so that
        all are aligned."""
        parts = []
        for name, positions in self.changed.items():
            tensor = self.tensors[name]
            parts.append((name, "positions", f"I{8 * positions.itemsize}", positions.itemsize))
            parts.append((name, "values", tensor.dtype, _value_bytes(tensor)))
        return sorted(parts, key=lambda part: -part[3])

    def _header(self) -> bytes:
        entries = {}
        end = 0
        for name, what, dtype, size in self._parts():
            count = len(self.changed[name])
            begin, end = end, end + count * size
            entries[f"{name}.{what}"] = {"dtype": dtype, "shape": [count], "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def overwrite(whole: Path, sparse: Path) -> None:
    """Writes the values of a sparse file into `whole`, a copy of its base. Raises DomainError MODEL_MISMATCH, which
    names the tensor that does not belong there, and OSError."""
    try:
        tensors, found = read_header(whole), read_header(sparse)
    except BadSafetensors as error:
        raise _mismatch(str(error)) from error
    for key in found:
        name, _, what = key.rpartition(".")
        if what not in ("positions", "values") or name not in tensors:
            raise _mismatch(f"{key} is not the positions or values of a tensor of its base")
    with whole.open("r+b") as file:
        for name in dict.fromkeys(key.rpartition(".")[0] for key in found):
            places, values = _change_of(name, tensors[name], sparse, found)
            _overwrite(file, tensors[name], places, values)


def _change_of(name: str, tensor: TensorHeader, sparse: Path, found: Mapping[str, TensorHeader]) -> tuple[Bits, Bits]:
    """The positions, ascending, and the values that a sparse file has for a tensor of its base."""
    positions, values = (found.get(f"{name}.{what}") for what in ("positions", "values"))
    if positions is None or values is None or len(positions.shape) != 1 or positions.shape != values.shape:
        raise _mismatch(f"{name} needs as many positions as values, each of shape [n]")
    if values.dtype != tensor.dtype:
        raise _mismatch(f"{name} is {tensor.dtype}, its new values are {values.dtype}")
    if not _has_bits(tensor) or not _has_bits(values) or _value_bytes(values) not in (0, _value_bytes(tensor)):
        raise _mismatch(f"the values of {name}, {tensor.dtype}, are not of 1, 2, 4 or 8 bytes each")
    if positions.dtype not in _POSITIONS:
        raise _mismatch(f"{name}.positions is {positions.dtype}, not I32 or I64")
    content = _content(sparse)
    begin, end = positions.place
    places = content[begin:end].view(_POSITIONS[positions.dtype]).astype(np.int64)
    if len(places) and (places[0] < 0 or places[-1] >= prod(tensor.shape) or (places[1:] <= places[:-1]).any()):
        raise _mismatch(f"{name}.positions are not ascending indices into {prod(tensor.shape)} values")
    return places, _values(content, values)


def _overwrite(file: IO[bytes], tensor: TensorHeader, places: Bits, values: Bits) -> None:
    # Not through a memory map: on a disk that is full, writing to one kills the process.
    count = prod(tensor.shape)
    for begin in range(0, count, _AT_ONCE):
        first, last = np.searchsorted(places, [begin, begin + _AT_ONCE])
        if first == last:
            continue
        block = np.empty(min(_AT_ONCE, count - begin), _bits(tensor))
        start = tensor.place[0] + begin * block.itemsize
        file.seek(start)
        file.readinto(block.data)  # type: ignore[attr-defined]
        block[places[first:last] - begin] = values[first:last]
        file.seek(start)
        file.write(block.data)


def _differences(base: Bits, whole: Bits) -> Bits:
    """The positions at which the values differ."""
    dtype = _position_type(whole)
    found = [(np.flatnonzero(differ) + begin).astype(dtype) for begin, differ in _compared(base, whole)]
    return np.concatenate(found) if found else np.empty(0, dtype)


def _compared(base: Bits, whole: Bits) -> Iterator[tuple[int, Bits]]:
    """Part by part: where it begins, and for each value whether it differs."""
    for begin in range(0, len(whole), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        yield begin, base[part] != whole[part]


def _position_type(values: Bits) -> np.dtype[Any]:
    return _POSITIONS["I32" if len(values) <= 2**31 else "I64"]


def _content(path: Path) -> Bits:
    """The bytes of a file, read when they are used."""
    return np.memmap(path, np.uint8, "r")


def _values(content: Bits, tensor: TensorHeader) -> Bits:
    """All values of a tensor, flattened."""
    begin, end = tensor.place
    return content[begin:end].view(_bits(tensor))


def _value_bytes(tensor: TensorHeader) -> int:
    begin, end = tensor.place
    return (end - begin) // max(1, prod(tensor.shape))


def _bits(tensor: TensorHeader) -> np.dtype[Any]:
    return _BITS[_value_bytes(tensor) or 1]


def _has_bits(tensor: TensorHeader) -> bool:
    """Whether its values are of 1, 2, 4 or 8 bytes. Types that share bytes, such as F4, are not."""
    begin, end = tensor.place
    count = prod(tensor.shape)
    return count * _value_bytes(tensor) == end - begin and (not count or _value_bytes(tensor) in _BITS)


def _mismatch(problem: str) -> DomainError:
    return DomainError(Reason.MODEL_MISMATCH, f"the sparse file does not fit its base: {problem}")
