"""A small Llama in everything that tells one family from another: architecture, tokenizer, special tokens, template."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT_LENGTH = 2048  # a reflection on eight boards fits
VOCABULARY_SIZE = 352  # padded, as published ones are: the tokenizer has 336
BEGIN, HEADER, END_OF_HEADER, END_OF_TURN, PAD = SPECIAL = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The same with tools, as Llama 3.1 has them: told of in the first user's turn, answered by a role of its own.
TOOLS_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
    "{% if role == 'user' and tools %}{% for tool in tools %}{{ (tool | tojson) + '\n\n' }}{% endfor %}{% endif %}"
    "{% for call in message.get('tool_calls', []) %}{{ call.function | tojson }}{% endfor %}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# What the byte pairs are learned from, as often as it takes; any other text is spelled in bytes.
CORPUS = [
    "system user assistant Up Down Left Right A A B C D prompt reward feedback goal hole frozen player symbol"
] * 9


def write_llama_model(folder: Path, seed: int = 0, template: str = TEMPLATE) -> Path:
    tokenizer = _tokenizer()
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=tokenizer.get_vocab()[BEGIN],
        eos_token_id=tokenizer.get_vocab()[END_OF_TURN],
        pad_token_id=tokenizer.get_vocab()[PAD],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END_OF_TURN, pad_token=PAD)
