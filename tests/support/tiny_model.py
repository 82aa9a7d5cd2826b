"""A model folder that loads in milliseconds: Qwen3's shape with random weights and tied embeddings, and a tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY_SIZE = 32
CONTEXT_LENGTH = 64
TEMPLATE = "{% for message in messages %}{{ message['content'] + '<end>' }}{% endfor %}"


def write_tiny_model(folder: Path, seed: int = 0, *, layers: int = 2, head_dim: int = 8) -> Path:
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    words = {"<pad>": 0, "<end>": 1, **{f"w{index}": index for index in range(2, VOCABULARY_SIZE)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), eos_token="<end>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_model(model: PreTrainedModel, folder: Path) -> Path:
    """A folder with another model and the tokenizer of the tiny one."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(write_tiny_model(folder / "tiny") / name, folder / name)
    return folder


def write_square_model(folder: Path, vocabulary: int = 64) -> Path:
    """A model folder with Llama's shape. All matrices have 64 columns; those without the vocabulary have 64 rows."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return write_model(LlamaForCausalLM(config), folder)
