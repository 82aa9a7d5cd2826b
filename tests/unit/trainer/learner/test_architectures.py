"""The documented list of architectures whose prefixes are shared, with models of random weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mulligan.common.errors import DomainError
from mulligan.trainer.data import Datum, Distillation
from mulligan.trainer.learner import tree_attention
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.losses import ppo
from tests.support.learning import server_settings, spec
from tests.support.paths import ROOT
from tests.support.tiny_model import VOCABULARY_SIZE, write_model

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    **{name: {"head_dim": 16} for name in ("gemma", "glm4", "ministral", "mistral", "qwen3")},
    "gemma3_text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    **{name: {"head_dim": 16} for name in ("gemma2", "vaultgemma")},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "qwen3_next": {
        **EXPERTS,
        "head_dim": 16,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 2,
    },
}


def rows() -> list[tuple[str, str]]:
    """Each architecture of the table, with what its row says."""
    page = (ROOT / "docs" / "docker.md").read_text()
    table = page[page.index("### Architectures that share prefixes") :].split("\n\n")[2].splitlines()[2:]
    return [(name, row.split("|")[1].strip()) for row in table for name in re.findall("`([a-z0-9_]+)`", row)]


@pytest.mark.parametrize(("name", "said"), rows())
def test_prefixes_are_shared_as_the_table_says(name: str, said: str) -> None:
    settings = {**SHAPE, **MORE.get(name, {})}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config: Any = CONFIG_MAPPING[name](**settings)
        model = AutoModelForCausalLM.from_config(config).eval().float()
    if said == "computed for each sequence":
        with pytest.raises(tree_attention.NoSharing):
            tree_attention.enable(model, "sdpa")
        return
    tree_attention.enable(model, "sdpa")
    with tree_attention._windows() as windows, torch.no_grad():
        model(input_ids=torch.arange(8)[None], use_cache=False)
    assert any(windows) == ("sliding window" in said)


def test_the_table_is_found() -> None:
    assert {said for _, said in rows()} >= {"computed once", "computed for each sequence"} and len(rows()) > 30


def learner_of(config: Any, folder: Path) -> tuple[Learner, Any]:
    """A learner, and the model of random weights that it has."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().float()
    return Learner("l", spec(write_model(model, folder)), server_settings(folder)), model


def imitated(datum_id: str, count: int) -> Datum:
    """A sequence of so many tokens, of which all but the first are trained."""
    tokens = tuple(3 + (7 * place + count) % 20 for place in range(count))
    return Datum(datum_id, tokens, (False,) + (True,) * (count - 1), 1.0, 1.0, Distillation(1.0), "all")


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "bloom"])
def test_a_model_without_torchs_attention_is_trained_as_transformers_computes_it(name: str, tmp_path: Path) -> None:
    config: Any = CONFIG_MAPPING[name](**{**SHAPE, "vocab_size": VOCABULARY_SIZE, **MORE.get(name, {})})
    if name == "bloom":  # as its own configurations
        del config.max_position_embeddings
    learner, model = learner_of(config, tmp_path)
    data = [imitated("short", 5), imitated("long", 14)]
    assert not learner.model.shares_prefixes and learner.forward_backward(data, ppo.Settings())["loss"] > 0
    assert all(probe.log_probs for probe in learner.model.probes())
    for found, datum in zip(learner.forward(data), data, strict=True):
        ids_1T = torch.tensor([datum.token_ids])
        with torch.no_grad():
            log_probs_TV = model(input_ids=ids_1T, use_cache=False).logits[0].log_softmax(-1)
        expected_T = log_probs_TV[:-1].gather(1, ids_1T[0, 1:, None])[:, 0]
        assert found == pytest.approx(expected_T.tolist(), abs=1e-4)


def test_no_sequence_changes_the_positions_of_another(tmp_path: Path) -> None:
    """Beyond the length of the first training, "longrope" rescales all positions of a pass."""
    positions = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 16,
    }
    shape = {**SHAPE, "vocab_size": VOCABULARY_SIZE, "initializer_range": 0.3}
    config: Any = CONFIG_MAPPING["phi3"](
        **{**shape, "original_max_position_embeddings": 16, "rope_parameters": positions}
    )
    learner, _ = learner_of(config, tmp_path)
    assert learner.model.limits.context_length == 16 and learner.model.shares_prefixes
    short, longest = imitated("short", 6), imitated("longest", 16)
    assert learner.forward([short, longest])[0] == pytest.approx(learner.forward([short])[0], abs=1e-5)
    with pytest.raises(DomainError, match="16"):
        learner.forward([short, imitated("longer", 17)])
