"""The layout of prefix trees: against sets of prefixes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from mulligan.trainer.learner import prefix_tree as trees
from mulligan.trainer.learner.prefix_tree import BLOCK_TOKENS, CHUNK_TOKENS, Layout, TreeSize
from tests.support.effort import examples

CPU = torch.device("cpu")
Tokens = tuple[int, ...]
# Few different tokens, so that sequences begin alike, are equal, or begin with one another.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=12)


def with_stems(data: st.DataObject) -> list[Tokens]:
    """Sequences that continue others, up to a few chunks long."""
    found: list[Tokens] = [()]
    for _ in range(data.draw(st.integers(1, 8))):
        stem = data.draw(st.sampled_from(found))
        size = data.draw(st.sampled_from([1, 2, CHUNK_TOKENS // 2, CHUNK_TOKENS, 2 * CHUNK_TOKENS]))
        kept = data.draw(st.integers(0, len(stem)))
        found.append((*stem[:kept], *(data.draw(st.integers(0, 2)) for _ in range(min(size, 3))), *([3] * (size - 3))))
    return found[1:]


def prefixes(sequences: Sequence[Tokens]) -> set[Tokens]:
    return {tokens[: size + 1] for tokens in sequences for size in range(len(tokens))}


def laid_out(sequences: Sequence[Tokens]) -> Layout:
    return trees.lay_out([trees.key(tokens) for tokens in sequences], CPU)


def attended(layout: Layout, window: int | None = None) -> list[list[int]]:
    """The nodes that each node attends to, read off the chunks as attention reads them."""
    size = len(layout.token_ids_T)
    tree = layout.tree.in_chunks(window)
    queries = list(range(size)) if tree.queries_Q is None else tree.queries_Q.tolist()
    keys = list(range(size)) if tree.keys_K is None else tree.keys_K.tolist()
    found: list[list[int]] = []
    for chunk in tree.chunks:
        own, queries = queries[: chunk.queries], queries[chunk.queries :]
        theirs, keys = keys[: chunk.keys], keys[chunk.keys :]
        assert chunk.mask_QK is not None or own == theirs, "without a mask, attention is causal"
        for place, query in list(enumerate(own))[chunk.skipped :]:
            mask = [other <= place for other in range(len(theirs))]
            if chunk.mask_QK is not None:
                mask = chunk.mask_QK[place].tolist()
            assert query == len(found)
            found.append(sorted(key for key, visible in zip(theirs, mask, strict=True) if visible))
    assert queries == keys == []
    return found


def check(sequences: Sequence[Tokens]) -> None:
    layout = laid_out(sequences)
    assert len(layout.token_ids_T) == len(prefixes(sequences))
    seen = attended(layout)
    for tokens, path in zip(sequences, layout.paths, strict=True):
        assert tuple(layout.token_ids_T[path]) == tokens
        assert layout.depths_T[path].tolist() == list(range(len(tokens)))
        for place, node in enumerate(path.tolist()):
            assert seen[node] == path[: place + 1].tolist()
    check_blocks(layout, seen)


def check_blocks(layout: Layout, seen: list[list[int]]) -> None:
    """The mask of FlexAttention is of the same nodes, and its blocks are those that torch finds in it."""
    size = len(seen)
    blocks = layout.tree.block_mask()
    places = torch.arange(size)
    zero = torch.zeros((), dtype=torch.int64)
    mask_TT = blocks.mask_mod(zero, zero, places[:, None], places)
    assert [row.nonzero()[:, 0].tolist() for row in mask_TT] == seen
    expected = create_block_mask(blocks.mask_mod, None, None, size, size, "cpu", BLOCK_TOKENS)
    assert (blocks.shape, blocks.BLOCK_SIZE) == (expected.shape, expected.BLOCK_SIZE)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(blocks, name), getattr(expected, name)), name


def check_window(sequences: Sequence[Tokens], window: int) -> None:
    """Both ways of attention see the last `window` nodes of each path, and no others."""
    layout = laid_out(sequences)
    expected: list[list[int]] = [[]] * len(layout.token_ids_T)
    for path in layout.paths:
        for place, node in enumerate(path.tolist()):
            expected[node] = path[max(0, place + 1 - window) : place + 1].tolist()
    assert attended(layout, window) == expected
    size = len(expected)
    seen_TT = torch.zeros(size, size, dtype=torch.bool)
    for node, keys in enumerate(expected):
        seen_TT[node, keys] = True
    blocks = layout.tree.block_mask(window)
    places = torch.arange(size)
    zero = torch.zeros((), dtype=torch.int64)
    mask_TT = blocks.mask_mod(zero, zero, places[:, None], places)
    found_TT = torch.zeros_like(seen_TT)
    assert blocks.full_kv_indices is not None and blocks.full_kv_num_blocks is not None
    for row in range(len(blocks.kv_num_blocks[0, 0])):
        queries = slice(row * BLOCK_TOKENS, (row + 1) * BLOCK_TOKENS)
        partly = blocks.kv_indices[0, 0, row, : int(blocks.kv_num_blocks[0, 0, row])].tolist()
        wholly = blocks.full_kv_indices[0, 0, row, : int(blocks.full_kv_num_blocks[0, 0, row])].tolist()
        for column in partly:
            shown = slice(column * BLOCK_TOKENS, (column + 1) * BLOCK_TOKENS)
            found_TT[queries, shown] = mask_TT[queries, shown]
        for column in wholly:
            found_TT[queries, column * BLOCK_TOKENS : (column + 1) * BLOCK_TOKENS] = True
    assert torch.equal(found_TT, seen_TT)


@given(SEQUENCES, st.integers(1, 9))
def test_a_window_shows_the_nearest_ancestors(sequences: list[Tokens], window: int) -> None:
    check_window(sequences, window)


@settings(max_examples=examples(20), deadline=None)
@given(st.data(), st.sampled_from([1, 2, CHUNK_TOKENS // 2, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS]))
def test_so_it_is_over_several_chunks_and_pieces(data: st.DataObject, window: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trees, "WINDOW_TOKENS", data.draw(st.sampled_from([3, 100, trees.WINDOW_TOKENS])))
        check_window(with_stems(data), window)


def test_masks_of_a_window_do_not_grow_with_the_square_of_a_long_sequence() -> None:
    """Two answers of 20,000 tokens, of which each token sees 500."""
    layout = laid_out([(1, *[2] * 20_000), (1, *[3] * 20_000)])
    masks = [chunk.mask_QK for chunk in layout.tree.in_chunks(500).chunks]
    assert max(mask.numel() for mask in masks if mask is not None) <= trees.WINDOW_TOKENS * (trees.WINDOW_TOKENS + 500)
    assert layout.tree.in_chunks(20_001) is layout.tree.in_chunks()


@given(SEQUENCES)
def test_each_prefix_is_one_node_that_sees_its_ancestors(sequences: list[Tokens]) -> None:
    check(sequences)


@given(st.data())
def test_so_it_is_over_several_chunks(data: st.DataObject) -> None:
    check(with_stems(data))


@pytest.mark.parametrize(
    "sequences",
    [
        [(5,)],
        [(5,), (5,)],
        [(1, 2, 3), (1, 2)],
        [(1, 2), (3, 4)],
        [(2**31 - 1, 1), (256, 1), (1, 256)],  # ordered as numbers, not by their lowest byte
    ],
)
def test_the_smallest_trees(sequences: list[Tokens]) -> None:
    check(sequences)


@given(SEQUENCES)
def test_the_size_is_known_before_the_tree(sequences: list[Tokens]) -> None:
    size = TreeSize()
    for count, tokens in enumerate(sequences, 1):
        size.add(trees.key(tokens))
        assert size.nodes == len(prefixes(sequences[:count]))


def test_a_long_sequence_needs_no_mask() -> None:
    layout = laid_out([(1, *[2] * 5000), (1, *[3] * 5000), (1, 4)])
    assert [chunk.mask_QK is None for chunk in layout.tree.in_chunks().chunks] == [True, True, True]


def test_masks_grow_with_the_nodes_and_not_with_their_square() -> None:
    """1,000 answers of 20 tokens to a question of 300."""
    answers = [(*[1] * 300, index, *[2] * 20) for index in range(1000)]
    masks = [chunk.mask_QK for chunk in laid_out(answers).tree.in_chunks().chunks]
    largest = (CHUNK_TOKENS + 20) * (CHUNK_TOKENS + 320)
    assert max(mask.numel() for mask in masks if mask is not None) <= largest
    assert len(masks) < 1.2 * 1000 * 21 / CHUNK_TOKENS
