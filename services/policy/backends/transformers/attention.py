"""Attention over a cache of slots, for forward passes in which requests of any length and progress share one row.

All new tokens of all requests are packed into one row [1, N], so that every layer but attention computes nothing for
padding. Attention reads each request's own past from its slot of the cache. transformers lets a model run with an
attention function that is registered under a name, and then leaves masks to it:
https://huggingface.co/docs/transformers/attention_interface

Shapes: N packed tokens; per group of requests G rows, Q queries, L keys; H heads, D their size.
"""

from __future__ import annotations

import itertools
import math
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from mulligan.common.model_files import UnsupportedModel

NAME = "mulligan"
# Requests with similar numbers of new tokens are padded to the longest of their group; upper ends of the groups.
_GROUP_ENDS = np.array([1, 32, 256])
# What a model may ask of its attention that this one does not compute.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")

Ints = npt.NDArray[np.int64]


class Attend(Protocol):
    """How the attention of the forward pass that runs in this thread is computed."""

    def __call__(
        self,
        layer: int,
        query_1HND: torch.Tensor,
        key_1HND: torch.Tensor,
        value_1HND: torch.Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """The output, [1, N, H, D]."""


_running = threading.local()


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Within it, models with the attention implementation `NAME` use this one."""
    _running.attend = attend
    try:
        yield
    finally:
        del _running.attend


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # always None: see the module's docstring
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedModel(f"attention with {name} is not supported by this backend")
    attend: Attend = _running.attend
    return attend(int(module.layer_idx), query, key, value, scale=scaling, window=sliding_window), None  # type: ignore[arg-type]


AttentionInterface.register(NAME, _attention)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps per token."""

    heads: int
    key_size: int
    value_size: int
    window: int | None


class DenseAttention:
    """Causal attention within each row of a right-padded batch, without a cache. Notes what the layers keep."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}

    def __call__(
        self,
        layer: int,
        query_1HND: torch.Tensor,
        key_1HND: torch.Tensor,
        value_1HND: torch.Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        _, heads, length, key_size = key_1HND.shape
        self.layers[layer] = LayerShape(heads, key_size, value_1HND.shape[-1], window)
        mask = None
        if window is not None and window < length:
            position = torch.arange(length, device=query_1HND.device)
            distance = position[:, None] - position[None, :]
            mask = (distance >= 0) & (distance < window)
        output = scaled_dot_product_attention(
            query_1HND,
            key_1HND,
            value_1HND,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query_1HND.shape[1] != heads,
        )
        return output.transpose(1, 2).contiguous()


class SlotCache:
    """Keys and values of every layer: [slots, H, capacity, D]. Zeros where nothing was written: masked, not NaN.

    On a CPU, attention over this layout takes less than half the time of one with the capacity before the heads.

    `room` is how many tokens all slots may hold together; without it all may be full. On a CPU a slot takes up memory
    for the tokens alone that were written to it, until it is cleared. So there may be more slots than could be full.
    """

    def __init__(
        self,
        layers: dict[int, LayerShape],
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        room: int | None = None,
    ):
        self.slots = slots
        self.capacity = capacity
        self.dtype = dtype
        self.room = slots * capacity if room is None else room
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self._pages: list[tuple[mmap.mmap, int, int]] = []  # with the heads, and the bytes of one head of a slot
        for layer, shape in layers.items():
            for store, size in ((self.keys, shape.key_size), (self.values, shape.value_size)):
                store[layer] = self._zeros((slots, shape.heads, capacity, size), device)

    @staticmethod
    def bytes_per_token(layers: dict[int, LayerShape], dtype: torch.dtype) -> int:
        return dtype.itemsize * sum(shape.heads * (shape.key_size + shape.value_size) for shape in layers.values())

    def _zeros(self, shape: tuple[int, int, int, int], device: torch.device) -> torch.Tensor:
        """On a CPU, each page takes up memory once something is written to it: pages of a new mapping are zeros."""
        if device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=device)
        size = math.prod(shape) * self.dtype.itemsize
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # a system without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)  # one written token would take up 2 MiB of each head
        self._pages.append((pages, shape[1], size // (self.slots * shape[1])))
        return torch.frombuffer(pages, dtype=self.dtype).view(shape)

    def clear(self, slot: int, begin: int = 0) -> None:
        """Gives the memory of a slot's tokens from `begin` on back. They are zeros then, but where tokens that are kept
        have a part of the page."""
        for pages, heads, size in self._pages:
            skipped = begin * size // self.capacity
            first = slot * heads * size
            ends = [first + heads * size] if not begin else [first + (head + 1) * size for head in range(heads)]
            length = (heads if not begin else 1) * size - skipped
            for end in ends:
                start = -(-(end - length) // mmap.PAGESIZE) * mmap.PAGESIZE
                stop = end // mmap.PAGESIZE * mmap.PAGESIZE
                if start < stop:
                    pages.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[target, :, :length] = tensor[source, :, :length]

    def close(self) -> None:
        """Frees the memory. Nothing may use it any longer."""
        self.keys.clear()
        self.values.clear()
        self._pages.clear()


class _Group:
    """Requests that attend together: their queries padded to Q, their keys read up to L.

    `slots` is a range that covers the requests' slots where that is dense enough to read it in place; otherwise the
    slots themselves, which are copied together first. Two things that are so in most passes spare work in every layer:
    `is_packed`, the rows are the packed tokens as they are; `sees_all`, every query sees all keys that are read.
    """

    def __init__(self, packed: Packed, first: int, last: int, device: torch.device):
        slots_R = packed.slots[first:last]
        counts_R = packed.counts[first:last]
        starts_R = packed.starts[first:last]
        low = int(slots_R.min())
        high = int(slots_R.max()) + 1
        in_place = high - low <= 2 * len(slots_R)
        local_R = slots_R - low if in_place else np.arange(len(slots_R))
        size = high - low if in_place else len(slots_R)
        width = int(counts_R.max())
        begin = int(starts_R[0])
        end = int(starts_R[-1] + counts_R[-1])
        padded_GQ = np.zeros((size, width), dtype=np.int64)  # a row without a request repeats the first packed token
        padded_GQ[local_R] = np.minimum(starts_R[:, None] + np.arange(width), (starts_R + counts_R - 1)[:, None])
        request_N = np.repeat(np.arange(len(slots_R)), counts_R)
        back_N = local_R[request_N] * width + np.arange(begin, end) - starts_R[request_N]
        self.size = size
        self.width = width
        self.device = device
        self.length = int(packed.positions[begin:end].max()) + 1
        self.slots: slice | torch.Tensor = slice(low, high) if in_place else torch.from_numpy(slots_R).to(device)
        tokens = np.arange(len(packed.positions))
        self.is_packed = np.array_equal(padded_GQ.reshape(-1), tokens) and np.array_equal(back_N, tokens)
        self.sees_all = width == 1 and bool((packed.positions[padded_GQ] == self.length - 1).all())
        self.packed = torch.from_numpy(padded_GQ.reshape(-1)).to(device)
        self.back = torch.from_numpy(back_N).to(device)
        self._positions_GQ = torch.from_numpy(np.minimum(packed.positions[padded_GQ], self.length - 1)).to(device)
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive, [G, 1, Q, L]; the same for all layers of one kind. None where nothing is masked."""
        if self.sees_all and (window is None or window >= self.length):
            return None
        if window not in self._masks:
            key_L = torch.arange(self.length, device=self.device)
            query_GQ1 = self._positions_GQ[:, :, None]
            seen = key_L <= query_GQ1
            if window is not None:
                seen &= key_L > query_GQ1 - window
            zero = torch.zeros((), dtype=dtype, device=self.device)
            self._masks[window] = torch.where(seen, zero, float("-inf"))[:, None]
        return self._masks[window]


@dataclass(frozen=True, slots=True)
class Packed:
    """One forward pass: for each of R requests its slot and its run of new tokens; for each of N tokens its place.

    Requests are ordered by the number of their new tokens.
    """

    slots: Ints  # [R]
    counts: Ints  # [R]
    starts: Ints  # [R], of the runs in the packed row
    positions: Ints  # [N], in each token's own sequence
    places: Ints  # [N], slot * capacity + position

    @property
    def last(self) -> Ints:
        """[R], of each request's last new token in the packed row."""
        return self.starts + self.counts - 1


def pack(slots_R: Ints, pasts_R: Ints, counts_R: Ints, capacity: int) -> Packed:
    """`pasts_R`: tokens of each request that the cache holds; `counts_R`: how many follow in this pass (at least 1)."""
    order_R = np.argsort(np.searchsorted(_GROUP_ENDS, counts_R), kind="stable")
    slots_R = slots_R[order_R]
    pasts_R = pasts_R[order_R]
    counts_R = counts_R[order_R]
    starts_R = np.cumsum(counts_R) - counts_R
    positions_N = np.arange(int(counts_R.sum())) + np.repeat(pasts_R - starts_R, counts_R)
    return Packed(slots_R, counts_R, starts_R, positions_N, np.repeat(slots_R * capacity, counts_R) + positions_N)


class SlotAttention:
    """Attention of one packed forward pass: writes the new keys and values, then attends per group of requests."""

    def __init__(self, cache: SlotCache, packed: Packed, device: torch.device):
        self._cache = cache
        slots_N = np.repeat(packed.slots, packed.counts)
        self._places = (torch.from_numpy(slots_N).to(device), torch.from_numpy(packed.positions).to(device))
        kinds_R = np.searchsorted(_GROUP_ENDS, packed.counts)
        bounds = [0, *(np.flatnonzero(np.diff(kinds_R)) + 1).tolist(), len(kinds_R)]
        self._groups = [_Group(packed, a, b, device) for a, b in itertools.pairwise(bounds)]

    def __call__(
        self,
        layer: int,
        query_1HND: torch.Tensor,
        key_1HND: torch.Tensor,
        value_1HND: torch.Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        packed = (part[0].transpose(0, 1) for part in (query_1HND, key_1HND, value_1HND))
        return self.attend(layer, *packed, scale=scale, window=window)[None]

    def attend(
        self,
        layer: int,
        query_NHD: torch.Tensor,
        key_NHD: torch.Tensor,
        value_NHD: torch.Tensor,
        *,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """The output, [N, H, D]. Keys and values may have fewer heads."""
        keys = self._cache.keys[layer]
        values = self._cache.values[layer]
        keys.transpose(1, 2).index_put_(self._places, key_NHD)
        values.transpose(1, 2).index_put_(self._places, value_NHD)
        shared_heads = query_NHD.shape[1] != keys.shape[1]
        outputs = [
            self._attend(group, query_NHD, keys, values, scale=scale, window=window, shared_heads=shared_heads)
            for group in self._groups
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    def _attend(
        group: _Group,
        query_NHD: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float | None,
        window: int | None,
        shared_heads: bool,
    ) -> torch.Tensor:
        query_NHD = query_NHD if group.is_packed else query_NHD.index_select(0, group.packed)
        query_GQHD = query_NHD.unflatten(0, (group.size, group.width))
        output_GHQD = scaled_dot_product_attention(
            query_GQHD.transpose(1, 2),
            _read(keys, group),
            _read(values, group),
            attn_mask=group.mask(window, query_NHD.dtype),
            scale=scale,
            enable_gqa=shared_heads,
        )
        output_NHD = output_GHQD.transpose(1, 2).flatten(0, 1)
        return output_NHD if group.is_packed else output_NHD.index_select(0, group.back)


def _read(store: torch.Tensor, group: _Group) -> torch.Tensor:
    """Keys or values of a group, [G, H, L, D]."""
    until = store[:, :, : group.length]
    return until[group.slots] if isinstance(group.slots, slice) else until.index_select(0, group.slots)


def token_rows(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """A right-padded batch, [B, T]. The padding is never attended to: it comes after all that is real."""
    rows_BT = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for row, sequence in zip(rows_BT, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(rows_BT)
