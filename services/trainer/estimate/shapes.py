"""The shape of a model: the sizes in its config.json, and the parameter counts that follow from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mulligan import models
from mulligan.common.model_files import is_hub_id
from mulligan.common.suggest import did_you_mean


class UnknownShape(Exception):
    """The shape of a model is not known. The message says which config.json to give."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of Llama's kind: attention and a gated MLP in each layer. Sizes are numbers of values."""

    architecture: str  # `model_type` of config.json
    vocabulary: int
    context: int  # tokens
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    tied: bool  # whether the output head has the weights of the embedding
    query_norms: int  # parameters of the norms of queries and keys, per layer; 0 without such norms
    biases: int  # parameters, per layer
    windows: tuple[int, ...]  # how many tokens back each layer sees; 0: all

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Size of the keys, and of the values."""
        return self.key_value_heads * self.head_size

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear maps of a layer, by name."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear maps of all layers, by the names that they have in transformers."""
        return {
            f"model.layers.{layer}.{'mlp' if name in _MLP else 'self_attn'}.{name}": sizes
            for layer in range(self.layers)
            for name, sizes in self.linears.items()
        }

    @property
    def layer_matrices(self) -> int:
        """Parameters of the linear maps of a layer."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def layer_parameters(self) -> int:
        return self.layer_matrices + self.biases + 2 * self.hidden + self.query_norms

    @property
    def head_parameters(self) -> int:
        """Of the output head, and of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def outer_parameters(self) -> int:
        """Those outside of the layers: embedding, last norm, and the head if it has weights of its own."""
        return self.head_parameters * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.outer_parameters + self.layers * self.layer_parameters


# https://huggingface.co/Qwen/Qwen3-4B, https://huggingface.co/Qwen/Qwen3-0.6B: config.json
QWEN3_4B: Mapping[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
# The models of the paper's experiments (arXiv 2602.13949, section 4), and relatives of the same shape, by hub id.
# https://huggingface.co/allenai/Olmo-3-7B-Instruct: config.json
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-4B": QWEN3_4B,
    "Qwen/Qwen3-4B-Instruct-2507": {**QWEN3_4B, "max_position_embeddings": 262144},
    "Qwen/Qwen3-0.6B": {
        **QWEN3_4B,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "allenai/Olmo-3-7B-Instruct": {
        "model_type": "olmo3",
        "vocab_size": 100278,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 65536,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
}
_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "olmo3")
_BIASED = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def shape_of(source: str) -> tuple[ModelShape, str]:
    """The shape of what `model.source` names, and where it is from: a config.json of this machine, or "known shape".

    A folder needs nothing but its config.json. Raises UnknownShape, and UnsupportedModel as `models.locate` does.
    """
    path = models.locate(source)
    if not is_hub_id(path):
        return _read(Path(path) / "config.json")
    if cached := _cached(path):
        return _read(cached)
    known = {name.lower(): name for name in KNOWN}
    if path.lower() not in known:
        raise UnknownShape(
            f"{source}: its config.json is not on this machine; give the folder that holds it: "
            f"--set model.source=FOLDER. Known without it: {', '.join(KNOWN)}{did_you_mean(path, KNOWN)}"
        )
    return shape_from(KNOWN[known[path.lower()]]), "known shape"


def _cached(hub_id: str) -> Path | None:
    """The config.json of a model that was downloaded from the hub before."""
    from huggingface_hub import try_to_load_from_cache  # its import takes a moment, and most models are folders

    found = try_to_load_from_cache(hub_id, "config.json")
    return Path(found) if isinstance(found, str) else None


def _read(path: Path) -> tuple[ModelShape, str]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UnknownShape(f"{path}: {error.strerror}; expected the config.json of a model") from error
    except ValueError as error:
        raise UnknownShape(f"{path} cannot be read as JSON: {error}") from error
    try:
        return shape_from(config), str(path)
    except UnknownShape as error:
        raise UnknownShape(f"{path}: {error}") from error


def shape_from(config: Any) -> ModelShape:
    """The shape that a config.json describes. Raises UnknownShape, which names the field."""
    if isinstance(config, Mapping) and isinstance(config.get("text_config"), Mapping):
        config = config["text_config"]
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if kind not in _ARCHITECTURES:
        near = did_you_mean(str(kind), _ARCHITECTURES)
        raise UnknownShape(f"model_type: expected {', '.join(_ARCHITECTURES)}, got {kind!r}{near}")

    def number(name: str, default: int | None = None) -> int:
        value = default if config.get(name) is None else config[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UnknownShape(f"{name}: expected a whole number of at least 1, got {value!r}")
        return value

    heads = number("num_attention_heads")
    shape = ModelShape(
        architecture=kind,
        vocabulary=number("vocab_size"),
        context=number("max_position_embeddings"),
        hidden=number("hidden_size"),
        intermediate=number("intermediate_size"),
        layers=number("num_hidden_layers"),
        heads=heads,
        key_value_heads=number("num_key_value_heads", heads),
        head_size=number("head_dim", number("hidden_size") // heads),
        tied=bool(config.get("tie_word_embeddings", False)),
        query_norms=0,
        biases=0,
        windows=_windows(config, kind, number("num_hidden_layers")),
    )
    norms = {"qwen3": 2 * shape.head_size, "olmo2": shape.queries + shape.keys, "olmo3": shape.queries + shape.keys}
    return replace(shape, query_norms=norms.get(kind, 0), biases=_biases(shape, config))


def _biases(shape: ModelShape, config: Mapping[str, Any]) -> int:
    biased: tuple[str, ...] = ()
    if shape.architecture == "qwen2":
        biased = _BIASED[:3]
    elif config.get("attention_bias"):
        biased = _BIASED
    if config.get("mlp_bias"):
        biased += _MLP
    return sum(shape.linears[name][1] for name in biased)


def _windows(config: Mapping[str, Any], kind: str, layers: int) -> tuple[int, ...]:
    """As transformers chooses the layers with a window."""
    window = config.get("sliding_window") or 0
    types = config.get("layer_types")
    if types is None and kind == "olmo3":
        types = ["sliding_attention" if (layer + 1) % 4 else "full_attention" for layer in range(layers)]
    if types is None:
        return (window if kind == "mistral" else 0,) * layers
    if len(types) != layers:
        raise UnknownShape(f"layer_types: expected one for each of {layers} layers, got {len(types)}")
    return tuple(window if each == "sliding_attention" else 0 for each in types)
