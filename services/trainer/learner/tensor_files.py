"""safetensors files that are written and read one tensor at a time.

The library's `save_file` needs all tensors in memory. Here a tensor that is shared out to several processes is gathered
when its turn comes, so the process that writes holds its own part and one whole tensor. The bytes are those of
`save_file`. Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mulligan.trainer.learner.sharding import whole

# In the library's order: a file begins with the types that come last.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_ALIGNMENT = 8


class TensorStream:
    """The tensors of a file, by name, in the order in which they are written. With a `dtype`, those of floating point
    are converted to it. An iterator over names and whole tensors on the CPU; every process must go through it."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None):
        order = list(_NAMES)
        self._types = {
            name: dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            for name, tensor in tensors.items()
        }
        self._tensors = dict(sorted(tensors.items(), key=lambda item: (-order.index(self._types[item[0]]), item[0])))
        self._rest = iter(self._tensors.items())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        name, tensor = next(self._rest)
        return name, self._whole(name, tensor).cpu().contiguous()

    def exhaust(self) -> None:
        """Takes part in the gathering of what is left."""
        for name, tensor in self._rest:
            self._whole(name, tensor)

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        return whole(tensor.detach().to(self._types[name]))

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * self._types[name].itemsize for name, tensor in self._tensors.items())

    def header(self) -> bytes:
        """The begin of the file, up to the first tensor."""
        entries = {}
        end = 0
        for name, tensor in self._tensors.items():
            dtype = self._types[name]
            begin, end = end, end + tensor.numel() * dtype.itemsize
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def write(stream: TensorStream, path: Path) -> str:
    """Writes the file. Returns its SHA-256. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        parts: Iterator[bytes | memoryview] = chain([stream.header()], map(_content, stream))
        for part in parts:
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def _content(entry: tuple[str, Tensor]) -> memoryview:
    return entry[1].reshape(-1).view(torch.uint8).numpy().data


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for. Raises SafetensorError for a file that is none."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self.shapes: dict[str, list[int]] = {}
        self.described: dict[str, tuple[list[int], str]] = {}  # shapes, and types as torch names them
        for name in self._file.keys():  # noqa: SIM118 - not a mapping
            entry = self._file.get_slice(name)
            self.shapes[name] = list(entry.get_shape())
            self.described[name] = (self.shapes[name], str(_TYPES[entry.get_dtype()]).removeprefix("torch."))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
