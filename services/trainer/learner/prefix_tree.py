"""Prefix trees of token sequences. What sequences share at their begin is one path, which the model computes once.

Sorted sequences are the tree in depth-first order: each adds the tokens that the one before it does not begin with. A
node is a token after a certain prefix. It attends to itself and to its ancestors: to those nodes that come before it
and whose subtree has not ended.

Attention has two ways to compute a tree (`tree_attention`). One needs chunks: neighbouring nodes whose attention is
computed at once. The keys of a chunk are the path that leads to it and its own nodes, so the cost does not grow with
the square of the number of nodes. The other needs to know which squares of the mask of all nodes are empty, and which
full.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

Nodes = NDArray[np.int64]

# A chunk ends with the sequence that brings it to so many nodes. Small ones cost calls, large ones masked pairs.
CHUNK_TOKENS = 128
BLOCK_TOKENS = 128  # of a square of the mask: FlexAttention's own size
_TOKEN_BYTES = 4


def key(token_ids: Sequence[int]) -> bytes:
    """The sequence as bytes that are ordered as the sequences are."""
    return np.asarray(token_ids, ">u4").tobytes()


def shared(one: bytes, other: bytes) -> int:
    """How many tokens two keys have in common at their begin."""
    size = min(len(one), len(other)) // _TOKEN_BYTES
    different = np.flatnonzero(np.frombuffer(one, "u4", size) != np.frombuffer(other, "u4", size))
    return int(different[0]) if len(different) else size


class TreeSize:
    """Counts the nodes of a tree to which sequences are added."""

    def __init__(self) -> None:
        self.nodes = 0
        self._keys: list[bytes] = []

    def add(self, key: bytes) -> None:
        place = bisect_left(self._keys, key)
        neighbours = self._keys[max(0, place - 1) : place + 1]
        self.nodes += len(key) // _TOKEN_BYTES - max((shared(key, other) for other in neighbours), default=0)
        self._keys.insert(place, key)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring nodes whose attention is computed at once. The first `skipped` queries only complete a square: their
    outputs are dropped."""

    queries: int
    keys: int
    skipped: int
    mask_QK: Tensor | None  # True where a query attends to a key; None: causal


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """A tree in chunks. Shapes: _Q the queries and _K the keys of all chunks, one chunk after another; None if they are
    the nodes in their order."""

    chunks: tuple[Chunk, ...]
    queries_Q: Tensor | None
    keys_K: Tensor | None
    _masks: dict[torch.dtype, list[Tensor | None]] = field(default_factory=dict)

    def additive_masks(self, dtype: torch.dtype) -> list[Tensor | None]:
        """The mask of each chunk as numbers that are added to the scores. All layers use the same."""
        if dtype not in self._masks:
            self._masks[dtype] = [
                None if chunk.mask_QK is None else _additive(chunk.mask_QK, dtype) for chunk in self.chunks
            ]
        return self._masks[dtype]


def _additive(mask_QK: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask_QK.shape, dtype=dtype, device=mask_QK.device).masked_fill(~mask_QK, float("-inf"))


@dataclass(frozen=True, slots=True)
class Start:
    """The first node that a sequence adds, and the path to it."""

    node: int
    path: Nodes


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """What attention needs to know of a tree, in the form that it asks for. All layers use the same.

    A node's subtree are the nodes from itself to the one before its end. Shape: _T nodes.
    """

    starts: tuple[Start, ...]
    ends_T: Nodes
    device: torch.device

    @property
    def is_sequence(self) -> bool:
        """It has one sequence, perhaps several times."""
        return len(self.starts) == 1

    @cached_property
    def in_chunks(self) -> Chunks:
        return _in_chunks(list(_ranges(self.starts, len(self.ends_T))), self.ends_T, self.device)

    @cached_property
    def block_mask(self) -> BlockMask:
        """The mask of all nodes, for FlexAttention. torch's `create_block_mask` finds the same blocks, from a mask of
        nodes × nodes, which would take gigabytes."""
        ends = torch.from_numpy(self.ends_T).to(self.device)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < ends[key])

        size = len(self.ends_T)
        firsts = np.arange(0, size, BLOCK_TOKENS)
        least, greatest = (each.reduceat(self.ends_T, firsts) for each in (np.minimum, np.maximum))
        earlier = firsts < firsts[:, None]  # rows are blocks of queries, columns are blocks of keys
        full = earlier & (least >= firsts[:, None] + BLOCK_TOKENS)
        some = earlier & (greatest > firsts[:, None]) | np.eye(len(firsts), dtype=bool)
        partly, wholly = (_listed(blocks, self.device) for blocks in (some & ~full, full))
        return BlockMask.from_kv_blocks(*partly, *wholly, BLOCK_TOKENS, visible, (size, size))


def _listed(blocks: NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, and which: those come first."""
    counts = torch.from_numpy(blocks.sum(1, dtype=np.int32))
    places = torch.from_numpy(np.argsort(~blocks, 1, kind="stable").astype(np.int32))
    return counts[None, None].to(device), places[None, None].to(device)


@dataclass(frozen=True, slots=True)
class Layout:
    """The nodes of the tree of some sequences, in depth-first order. Shape: _T nodes."""

    token_ids_T: Nodes
    depths_T: Nodes  # the position of each node in its sequences
    paths: tuple[Nodes, ...]  # the nodes of each sequence
    tree: PrefixTree


def lay_out(keys: Sequence[bytes], device: torch.device) -> Layout:
    """The tree of sequences that are given by their keys; they may be equal, or begin with one another."""
    paths: list[Nodes] = [np.empty(0, np.int64)] * len(keys)
    tokens: list[NDArray[Any]] = []
    depths: list[Nodes] = []
    starts: list[Start] = []
    branched: list[tuple[Nodes, int]] = []  # nodes whose subtree ends before the node
    path = np.empty(0, np.int64)
    before = b""
    size = 0
    for index in sorted(range(len(keys)), key=keys.__getitem__):
        common = shared(before, keys[index])
        ids = np.frombuffer(keys[index], ">u4")[common:]
        if len(ids):
            starts.append(Start(size, path[:common]))
            branched.append((path[common:], size))
            path = np.concatenate((path[:common], np.arange(size, size + len(ids))))
            tokens.append(ids)
            depths.append(np.arange(common, common + len(ids)))
            size += len(ids)
        paths[index] = path
        before = keys[index]
    ends = np.full(size, size)
    for nodes, end in branched:
        ends[nodes] = end
    tree = PrefixTree(tuple(starts), ends, device)
    return Layout(np.concatenate(tokens).astype(np.int64), np.concatenate(depths), tuple(paths), tree)


@dataclass(frozen=True, slots=True)
class _Range:
    begin: int
    end: int
    path: Nodes
    branches: bool

    @property
    def causal(self) -> bool:
        """Whether it is computed as the whole sequence, without mask. The queries of the path then cost less than the
        pairs that a mask would hide."""
        return not self.branches and len(self.path) <= self.end - self.begin


def _ranges(starts: Sequence[Start], size: int) -> Iterator[_Range]:
    """Joins what neighbouring sequences add to chunks. What is half a chunk alone stays alone if it needs no mask."""
    ends = [*(start.node for start in starts[1:]), size]
    first = 0  # of the chunk
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        alone = end - start.node >= CHUNK_TOKENS // 2 and len(start.path) <= end - start.node
        if alone and first < index:
            yield _Range(starts[first].node, start.node, starts[first].path, index - first > 1)
            first = index
        if alone or end - starts[first].node >= CHUNK_TOKENS or index + 1 == len(starts):
            yield _Range(starts[first].node, end, starts[first].path, index > first)
            first = index + 1


def _in_chunks(ranges: Sequence[_Range], ends_T: Nodes, device: torch.device) -> Chunks:
    chunks: list[Chunk] = []
    queries: list[Nodes] = []
    keys: list[Nodes] = []
    for one in ranges:
        own = np.arange(one.begin, one.end)
        keys.append(np.concatenate((one.path, own)))
        queries.append(keys[-1] if one.causal else own)
        mask_QK = None
        if not one.causal:
            visible = (keys[-1] <= own[:, None]) & (own[:, None] < ends_T[keys[-1]])
            mask_QK = torch.from_numpy(visible).to(device)
        chunks.append(Chunk(len(queries[-1]), len(keys[-1]), len(queries[-1]) - len(own), mask_QK))
    return Chunks(tuple(chunks), _index(queries, len(ends_T), device), _index(keys, len(ends_T), device))


def _index(parts: Sequence[Nodes], size: int, device: torch.device) -> Tensor | None:
    """None if it takes every node once: the parts are in the order of the nodes."""
    whole = np.concatenate(parts)
    return None if len(whole) == size else torch.from_numpy(whole).to(device)
