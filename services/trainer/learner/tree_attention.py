"""The attention of prefix trees, as attention functions of transformers.

A model with such a function computes a tree when its forward pass has the argument `prefix_tree`, which transformers
hands to each attention layer; without that argument it is transformers' own "sdpa".
https://huggingface.co/docs/transformers/en/attention_interface

"sdpa" computes a tree in chunks, each with a dense mask or causal. "flex" computes it at once with FlexAttention, which
skips the squares of the mask that are empty and holds no mask at all. That is for CUDA: torch has no backward pass of
it on the CPU. https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from mulligan.trainer.learner import prefix_tree as trees
from mulligan.trainer.learner.prefix_tree import Layout, PrefixTree

Kernel = Literal["sdpa", "flex"]
# Arguments of attention layers that change who sees whom, or the scores, by more than causality and a window.
_OTHER_ATTENTION = ("s_aux", "position_bias", "softcap", "cache")
# Sequences that branch, are equal and begin with one another. They are compared in the precision of the model: a wrong
# mask changes hidden states as much as another token does.
_PROBE = ((1, 2, 3, 4, 5), (1, 2, 3, 6), (1, 2, 3, 6, 7, 8), (1, 2, 3, 6), (9, 2, 3))
# Otherwise torch takes a kernel for decoding where a tree has fewer than 128 nodes. Compiled for any number of nodes,
# that kernel fails in torch 2.11: "NoValidChoicesError".
_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}
_KINDS = ("full_attention", "sliding_attention")  # of layers that trees can be computed in
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.05}
_seen_windows: ContextVar[list[int | None] | None] = ContextVar("seen_windows", default=None)


class NoSharing(Exception):
    """The model cannot compute prefix trees. The message says why."""


def attention(
    kernel: Kernel,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    prefix_tree: PrefixTree | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Shapes: query of 1 × heads × nodes × size, key and value with as many heads or fewer. The result is 1 × nodes ×
    heads × size. Torch's causal kernels are faster for a tree that is one sequence: by 17 % of a step of sequences of
    16,384 tokens on an H100. Raises NoSharing for layers that do more than causal attention, with or without a window:
    `sliding_window` is how many tokens a token sees, itself included."""
    window: int | None = kwargs.get("sliding_window") or None
    if (seen := _seen_windows.get()) is not None:
        seen.append(window)
    if prefix_tree is None and attention_mask is None:  # transformers makes no masks for this attention
        attention_mask = _band(query, window)
    if prefix_tree is None or (prefix_tree.is_sequence and (window is None or window >= prefix_tree.length)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    others = [name for name in _OTHER_ATTENTION if kwargs.get(name) is not None]
    if others or dropout or not getattr(module, "is_causal", True):
        raise NoSharing(f"its attention has {', '.join(others) or 'dropout or sees what comes later'}")
    found = _KERNELS[kernel](query, key, value, scaling, prefix_tree, window)
    return found.transpose(1, 2).contiguous(), None


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """The mask of a sequence that is longer than the window; None if causal attention is right."""
    size = query.shape[2]
    if window is None or window >= size:
        return None
    places = torch.arange(size, device=query.device)
    back_QK = places[:, None] - places
    return ((back_QK >= 0) & (back_QK < window))[None, None]


def _flex(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, tree: PrefixTree, window: int | None
) -> Tensor:
    precision = _precision(query)
    query, key, value = (each.to(precision) for each in (query, key, value))  # autocast leaves them as they are
    run: Any = flex_attention if query.device.type == "cpu" else _compiled_flex()
    grouped = query.shape[1] != key.shape[1]
    found: Tensor = run(
        query,
        key,
        value,
        block_mask=tree.block_mask(window),
        scale=scaling,
        enable_gqa=grouped,
        kernel_options=_OPTIONS,
    )
    return found


def _precision(tensor: Tensor) -> torch.dtype:
    """In which attention computes with the tensor."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


@cache
def _compiled_flex() -> Any:
    """Not compiled, it would compute all scores, of nodes × nodes."""
    return torch.compile(flex_attention)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, whole: PrefixTree, window: int | None
) -> Tensor:
    tree = whole.in_chunks(window)
    if tree.queries_Q is not None:
        query = query.index_select(2, tree.queries_Q)
    if tree.keys_K is not None:
        key, value = key.index_select(2, tree.keys_K), value.index_select(2, tree.keys_K)
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type != "cpu":  # with a mask, only the CPU's kernel takes fewer heads of keys
        key, value = (repeat_kv(each, query.shape[1] // each.shape[1]) for each in (key, value))
        grouped = False
    queries = query.split([chunk.queries for chunk in tree.chunks], 2)
    keys, values = (each.split([chunk.keys for chunk in tree.chunks], 2) for each in (key, value))
    outputs = []
    for chunk, mask_QK, q, k, v in zip(
        tree.chunks, tree.additive_masks(query.dtype), queries, keys, values, strict=True
    ):
        found = scaled_dot_product_attention(
            q, k, v, attn_mask=mask_QK, is_causal=mask_QK is None, scale=scaling, enable_gqa=grouped
        )
        outputs.append(found[:, :, chunk.skipped :])
    return torch.cat(outputs, 2)


# transformers gives no name with "sdpa" to a model that its own "sdpa" would not do.
_NAMES: dict[Kernel, str] = {"sdpa": "prefix_tree_dense", "flex": "prefix_tree_flex"}
_KERNELS: dict[Kernel, Callable[..., Tensor]] = {"sdpa": _sdpa, "flex": _flex}


def enable(model: Any, kernel: Kernel) -> None:
    """Gives the model this attention. Raises NoSharing if it cannot have it; then it is as before."""
    before = model.config._attn_implementation
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if others := sorted(set(kinds) - set(_KINDS)):
        raise NoSharing(f"it has layers of the kind {', '.join(others)}")
    if not model._can_set_attn_implementation():
        raise NoSharing("its attention is not an attention function of transformers")
    name = _NAMES[kernel]
    AttentionInterface.register(name, partial(attention, kernel))
    model.set_attn_implementation(name)
    try:
        _compare(model, kernel, kinds)
    except Exception as error:  # each architecture fails in its own way
        model.set_attn_implementation(before)
        raise error if isinstance(error, NoSharing) else NoSharing(f"{type(error).__name__}: {error}"[:300]) from error


@contextmanager
def _windows() -> Iterator[list[int | None]]:
    """The windows of the layers that run within the block, one for each; None: it has none."""
    seen: list[int | None] = []
    token = _seen_windows.set(seen)
    try:
        yield seen
    finally:
        _seen_windows.reset(token)


def _compare(model: Any, kernel: Kernel, kinds: Sequence[str]) -> None:
    """Raises NoSharing if the hidden states of a tree are not those of its sequences, or if a layer with a window, of
    which `kinds` says so, does not tell it. On a GPU the backward pass runs, too: what compiles kernels fails here, if
    it does, and not in training."""
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    sequences = [[token % vocabulary for token in tokens] for tokens in _PROBE]
    layout = trees.lay_out([trees.key(tokens) for tokens in sequences], device)
    with _windows() as seen, torch.set_grad_enabled(device.type != "cpu"):
        found_TH = model.base_model(
            input_ids=torch.from_numpy(layout.token_ids_T)[None].to(device),
            position_ids=torch.from_numpy(layout.depths_T)[None].to(device),
            prefix_tree=layout.tree,
            use_cache=False,
        ).last_hidden_state[0]
        if found_TH.requires_grad:
            torch.autograd.grad(found_TH.sum(), model.get_input_embeddings().weight)
    told = len(seen) - seen.count(None)
    if kinds and told < kinds.count("sliding_attention"):
        raise NoSharing(f"{kinds.count('sliding_attention')} of its layers have a window, and {told} say how wide")
    if told:
        _check_window(kernel, layout)
    with torch.no_grad():
        for tokens, path in zip(sequences, layout.paths, strict=True):
            ids_1T = torch.tensor([tokens], device=device)
            expected_TH = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
            difference = (found_TH[torch.from_numpy(path).to(device)] - expected_TH).abs().max()
            if not difference <= _TOLERANCE.get(_precision(found_TH), 0.05) * expected_TH.abs().max():
                raise NoSharing("a tree of short sequences has other hidden states than the sequences alone")


def _check_window(kernel: Kernel, layout: Layout) -> None:
    """Raises NoSharing if the kernel computes a window otherwise than a dense mask does; the sequences of `_PROBE` are
    shorter than windows of models."""
    device = layout.tree.device
    query = torch.linspace(-1, 1, 2 * len(layout.depths_T) * 64, device=device).sin().view(1, 2, -1, 64)
    query.requires_grad_(device.type != "cpu")
    found = _KERNELS[kernel](query, query, query, None, layout.tree, 2)
    mask_QK = torch.zeros(len(layout.depths_T), len(layout.depths_T), dtype=torch.bool)
    for path in layout.paths:
        mask_QK[path, path] = True
        mask_QK[path[1:], path[:-1]] = True
    expected = scaled_dot_product_attention(query, query, query, attn_mask=mask_QK.to(device))
    if query.requires_grad:
        torch.autograd.grad(found.sum(), query)
    if not (found - expected).abs().max() <= 0.05:
        raise NoSharing("a window hides something else in a tree than in its sequences")
