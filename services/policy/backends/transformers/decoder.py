"""The forward pass of the most common decoders, written out for packed tokens.

transformers computes a pass in many small operations, each started from Python. With few tokens, starting them takes
most of the time. The pass here has fewer: queries, keys and values are one matrix product, and so are both halves of
the gate. `Model` compares its log-probabilities to those of transformers when it loads.

Shapes: N packed tokens, R requests, C hidden size, V vocabulary; H heads of queries, K of keys, J = H + K, D their
size, E = D / 2; X numbers of all heads of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.functional import embedding, linear, rms_norm

from mulligan.policy.backends.transformers.attention import LayerShape, SlotAttention

# Classes of transformers whose layers are these: RMSNorm, attention with rotary positions, RMSNorm, gated MLP.
_CLASSES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


@dataclass(frozen=True, slots=True)
class _Layer:
    module: Any
    shape: LayerShape
    qkv: _Fused
    qk_norm: tuple[torch.Tensor, float] | None  # weights [2, D] of queries and keys; epsilon
    gate_up: _Fused


class Decoder:
    """Computes with the parameters of a module of transformers, which it rearranges: the module goes on to work, and
    values that are written into its parameters count here, too."""

    def __init__(self, module: Any, layers: Mapping[int, LayerShape]):
        self._inner = module.model
        self._head: nn.Linear = module.lm_head
        attention = self._inner.layers[0].self_attn
        self._size = int(attention.head_dim)
        self._keys = layers[0].heads
        self._queries = attention.q_proj.out_features // self._size
        kinds = [0] * self._queries + [1] * self._keys
        self._kind_of_head = torch.tensor(kinds, device=self._head.weight.device)
        self._layers = [_layer(inner, layers[index]) for index, inner in enumerate(self._inner.layers)]

    @staticmethod
    def can_run(module: Any) -> bool:
        """Whether all layers of the module are as this class computes them."""
        name = type(module).__name__
        if name not in _CLASSES or type(module) is not getattr(transformers, name):
            return False
        linears = [part for at, part in module.named_modules() if at.endswith(("_proj", "lm_head"))]
        own_bias = [layer.self_attn.o_proj.bias for layer in module.model.layers]
        own_bias += [layer.mlp.down_proj.bias for layer in module.model.layers]
        plain = all(type(part) is nn.Linear for part in linears)
        return plain and all(bias is None for bias in [*own_bias, module.lm_head.bias])

    def __call__(
        self, ids_N: torch.Tensor, positions_N: torch.Tensor, last_R: torch.Tensor, attend: SlotAttention
    ) -> torch.Tensor:
        """Logits [R, V] at the given indices of the packed tokens."""
        hidden_NC = embedding(ids_N, self._inner.embed_tokens.weight)
        cos_1ND, sin_1ND = self._inner.rotary_emb(hidden_NC, positions_N[None])
        cos_N1D = cos_1ND[0][:, None]
        sin_N1E = sin_1ND[0][:, None, : self._size // 2]  # the second half is the same
        for index, layer in enumerate(self._layers):
            attention = layer.module.self_attn
            qkv_NX = layer.qkv(_norm(layer.module.input_layernorm, hidden_NC))
            qkv_NXD = qkv_NX.unflatten(-1, (-1, self._size))
            heads = self._queries + self._keys
            qk_NJD = _rotated(self._normed(layer, qkv_NXD[:, :heads]), cos_N1D, sin_N1E)
            output_NHD = attend.attend(
                index,
                qk_NJD[:, : self._queries],
                qk_NJD[:, self._queries :],
                qkv_NXD[:, heads:],
                scale=attention.scaling,
                window=layer.shape.window,
            )
            hidden_NC = torch.addmm(hidden_NC, output_NHD.flatten(1), attention.o_proj.weight.t())
            gate, up = layer.gate_up(_norm(layer.module.post_attention_layernorm, hidden_NC)).chunk(2, -1)
            mlp = layer.module.mlp
            hidden_NC = torch.addmm(hidden_NC, mlp.act_fn(gate) * up, mlp.down_proj.weight.t())
        return linear(_norm(self._inner.norm, hidden_NC[last_R]), self._head.weight)

    def _normed(self, layer: _Layer, qk_NJD: torch.Tensor) -> torch.Tensor:
        if layer.qk_norm is None:
            return qk_NJD
        weights_2D, epsilon = layer.qk_norm
        normed: torch.Tensor = rms_norm(qk_NJD, (self._size,), None, epsilon)
        return normed * weights_2D[self._kind_of_head]


class _Fused:
    """Linear layers of one input, as one matrix product. Their parameters become views of its parameters."""

    def __init__(self, linears: Sequence[nn.Linear]):
        sizes = [part.out_features for part in linears]
        self._weight = _stacked([part.weight for part in linears], sizes)
        biases = [part.bias for part in linears if part.bias is not None]
        self._bias = _stacked(biases, sizes) if biases else None

    def __call__(self, input_NC: torch.Tensor) -> torch.Tensor:
        return linear(input_NC, self._weight, self._bias)


def _layer(module: Any, shape: LayerShape) -> _Layer:
    attention = module.self_attn
    qk_norm = None
    if hasattr(attention, "q_norm"):
        norms = [attention.q_norm, attention.k_norm]
        size = norms[0].weight.numel()
        weights_2D = _stacked([norm.weight for norm in norms], [size, size]).view(2, size)
        qk_norm = (weights_2D, norms[0].variance_epsilon)
    return _Layer(
        module,
        shape,
        _Fused([attention.q_proj, attention.k_proj, attention.v_proj]),
        qk_norm,
        _Fused([module.mlp.gate_proj, module.mlp.up_proj]),
    )


def _stacked(parameters: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    """All rows in one tensor, which the parameters become views of."""
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, rows in zip(parameters, whole.split(list(sizes)), strict=True):
        parameter.data = rows
    return whole


def _norm(norm: Any, input_NC: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = rms_norm(input_NC, (input_NC.shape[-1],), norm.weight, norm.variance_epsilon)
    return result


def _rotated(input_NJD: torch.Tensor, cos_N1D: torch.Tensor, sin_N1E: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864). As in transformers, a number in the first half of a head is rotated together
    with the one at the same place in the second half."""
    first, second = input_NJD.chunk(2, -1)
    output_NJD = input_NJD * cos_N1D
    turned, after = output_NJD.chunk(2, -1)
    turned.addcmul_(second, sin_N1E, value=-1)
    after.addcmul_(first, sin_N1E)
    return output_NJD
