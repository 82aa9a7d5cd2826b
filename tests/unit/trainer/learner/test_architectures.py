"""The documented list of architectures whose prefixes are shared, with models of random weights."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mulligan.trainer.learner import tree_attention
from tests.support.paths import ROOT

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
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().float()
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
