"""Shapes of models, compared with the parameters that transformers makes for the same config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mulligan.models import EMBEDDED
from mulligan.trainer.estimate.shapes import KNOWN, UnknownShape, shape_from, shape_of

SIZES = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": 32},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", "sliding_window": 32},
}


@pytest.mark.parametrize("config", [*({**SIZES, **own} for own in CONFIGS.values()), *KNOWN.values()])
def test_parameters_are_those_of_the_model(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SIZES, **config}))
    shape = shape_from({**SIZES, **config})
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    kinds = getattr(model.config, "layer_types", None)
    windowed = config["model_type"] == "mistral"
    assert [bool(window) for window in shape.windows] == (
        [kind == "sliding_attention" for kind in kinds] if kinds else [windowed] * shape.layers
    )
    matrices = {
        name.rpartition(".")[2]: (module.in_features, module.out_features)
        for name, module in model.model.layers[0].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert shape.linears == matrices
    assert shape.modules == {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def test_a_shape_is_read_from_a_folder_with_nothing_but_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((EMBEDDED / "config.json").read_bytes())
    shape, source = shape_of(str(tmp_path))
    assert source == str(tmp_path / "config.json")
    assert shape == shape_of("embedded")[0]


def test_a_config_that_was_downloaded_wins_over_a_known_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    known, source = shape_of("Qwen/Qwen3-4B")
    assert source == "known shape" and known.parameters == 4_022_468_096
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**KNOWN["Qwen/Qwen3-4B"], "num_hidden_layers": 2}))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(path))
    shape, source = shape_of("Qwen/Qwen3-4B")
    assert shape.layers == 2 and source == str(path)


def test_an_unknown_model_is_refused_and_says_what_to_give() -> None:
    with pytest.raises(UnknownShape, match=r"give the folder.*model.source=FOLDER.*did you mean 'Qwen/Qwen3-4B'"):
        shape_of("Qwen/Qwen3-4C")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "qwen3_moe"}, "model_type: expected .*; did you mean 'qwen3'"),
        ({"model_type": "qwen3", **SIZES, "hidden_size": None}, "hidden_size: expected a whole number"),
        ({"model_type": "qwen3", **SIZES, "num_hidden_layers": "4"}, "num_hidden_layers: expected .*'4'"),
        ({"model_type": "qwen3", **SIZES, "layer_types": ["full_attention"]}, "layer_types: expected .* 4 layers"),
        ([], "model_type: expected"),
    ],
)
def test_a_bad_config_is_refused_with_its_field(config: object, said: str) -> None:
    with pytest.raises(UnknownShape, match=said):
        shape_from(config)


def test_a_folder_without_a_config_and_one_with_a_broken_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownShape, match=r"config\.json: No such file"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnknownShape, match="cannot be read as JSON"):
        shape_of(str(tmp_path))
