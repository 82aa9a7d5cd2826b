"""Prefix trees of token sequences. What sequences share at their begin is one path, which the model computes once.

Sorted sequences are the tree in depth-first order: each adds the tokens that the one before it does not begin with. A
node is a token after a certain prefix. It attends to itself and to its ancestors: to those nodes that come before it
and whose subtree has not ended.

Attention has two ways to compute a tree (`tree_attention`). One needs chunks: neighbouring nodes whose attention is
computed at once. The keys of a chunk are the path that leads to it and its own nodes, so the cost does not grow with
the square of the number of nodes. The other needs to know which squares of the mask of all nodes are empty, and which
full.

A layer may have a window: then a node attends only to those ancestors that are less than so many tokens before it.
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
WINDOW_TOKENS = 1024  # nodes of a chunk at most, where a window hides some: its keys are the window and they
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
    depths_T: Nodes
    device: torch.device
    _chunks: dict[int, Chunks] = field(default_factory=dict)
    _blocks: dict[int, BlockMask] = field(default_factory=dict)

    @property
    def is_sequence(self) -> bool:
        """It has one sequence, perhaps several times."""
        return len(self.starts) == 1

    @cached_property
    def length(self) -> int:
        """Of its longest sequence. A window that is not shorter hides nothing."""
        return int(self.depths_T.max()) + 1

    def in_chunks(self, window: int | None = None) -> Chunks:
        width = min(window or self.length, self.length)
        if width not in self._chunks:
            ranges = list(_ranges(self.starts, len(self.ends_T)))
            if width < self.length:
                ranges = [piece for one in ranges for piece in _pieces(one, self.ends_T, self.depths_T, width)]
            self._chunks[width] = _in_chunks(ranges, self.ends_T, self.depths_T, width, self.device)
        return self._chunks[width]

    def block_mask(self, window: int | None = None) -> BlockMask:
        """The mask of all nodes, for FlexAttention. torch's `create_block_mask` finds the same blocks without a window,
        from a mask of nodes × nodes, which would take gigabytes. With one, blocks may be listed that the window empties
        or fills."""
        width = min(window or self.length, self.length)
        if width not in self._blocks:
            self._blocks[width] = self._block_mask(width)
        return self._blocks[width]

    def _block_mask(self, width: int) -> BlockMask:
        ends, depths = (torch.from_numpy(each).to(self.device) for each in (self.ends_T, self.depths_T))

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < ends[key])

        def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < ends[key]) & (depths[query] - depths[key] < width)

        size = len(self.ends_T)
        firsts = np.arange(0, size, BLOCK_TOKENS)
        least, greatest = (each.reduceat(self.ends_T, firsts) for each in (np.minimum, np.maximum))
        earlier = firsts < firsts[:, None]  # rows are blocks of queries, columns are blocks of keys
        full = earlier & (least >= firsts[:, None] + BLOCK_TOKENS)
        some = earlier & (greatest > firsts[:, None]) | np.eye(len(firsts), dtype=bool)
        if width < self.length:
            shallow, deep = (each.reduceat(self.depths_T, firsts) for each in (np.minimum, np.maximum))
            full &= deep[:, None] - shallow < width
            some &= shallow[:, None] - deep < width
        partly, wholly = (_listed(blocks, self.device) for blocks in (some & ~full, full))
        mask = visible if width == self.length else near
        return BlockMask.from_kv_blocks(*partly, *wholly, BLOCK_TOKENS, mask, (size, size))


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
    depths_T = np.concatenate(depths)
    tree = PrefixTree(tuple(starts), ends, depths_T, device)
    return Layout(np.concatenate(tokens).astype(np.int64), depths_T, tuple(paths), tree)


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


def _pieces(one: _Range, ends_T: Nodes, depths_T: Nodes, width: int) -> Iterator[_Range]:
    """The range in pieces of at most WINDOW_TOKENS nodes. Each has the end of its path that a window of `width` tokens
    shows. A node's ancestors before a piece are ancestors of the first node of the piece, too."""
    for begin in range(one.begin, one.end, WINDOW_TOKENS):
        path = np.concatenate((one.path, np.arange(one.begin, begin)))
        path = path[ends_T[path] > begin]
        end = min(begin + WINDOW_TOKENS, one.end)
        shallowest = int(depths_T[begin:end].min())
        yield _Range(begin, end, path[depths_T[path] > shallowest - width], one.branches)


def _in_chunks(ranges: Sequence[_Range], ends_T: Nodes, depths_T: Nodes, width: int, device: torch.device) -> Chunks:
    chunks: list[Chunk] = []
    queries: list[Nodes] = []
    keys: list[Nodes] = []
    for one in ranges:
        own = np.arange(one.begin, one.end)
        keys.append(np.concatenate((one.path, own)))
        near = int(depths_T[own].max()) - int(depths_T[keys[-1]].min()) < width
        causal = one.causal and near
        queries.append(keys[-1] if causal else own)
        mask_QK = None
        if not causal:
            visible = (keys[-1] <= own[:, None]) & (own[:, None] < ends_T[keys[-1]])
            if not near:
                visible &= depths_T[own][:, None] - depths_T[keys[-1]] < width
            mask_QK = torch.from_numpy(visible).to(device)
        chunks.append(Chunk(len(queries[-1]), len(keys[-1]), len(queries[-1]) - len(own), mask_QK))
    return Chunks(tuple(chunks), _index(queries, len(ends_T), device), _index(keys, len(ends_T), device))


def _index(parts: Sequence[Nodes], size: int, device: torch.device) -> Tensor | None:
    """None if it takes every node once: the parts are in the order of the nodes."""
    whole = np.concatenate(parts)
    return None if len(whole) == size else torch.from_numpy(whole).to(device)
