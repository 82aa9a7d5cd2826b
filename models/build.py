"""The shape, the tokenizer and the chat template of the embedded model.

Each word of the compact FrozenLake prompts is one token, also an answer such as "```Up```", so that a turn has few
tokens. All other text is encoded as bytes, so no text is unknown.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

MOVES = ("Up", "Down", "Left", "Right")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROLES = ("player", "goal", "hole", "floor")
PAD = "<|pad|>"
END = "<|end|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIAL = (PAD, END, SYSTEM, USER, ASSISTANT)
WORDS = (
    "\n",
    "√",
    *LETTERS,
    *MOVES,
    *(f"```{move}```" for move in MOVES),
    *(f"{move} (no effect)" for move in MOVES),
    *ROLES,
    *("<prompt>", "</prompt>", "invalid", "blocked\n", "blocked", "play", "explain", "nothing", "wrong"),
    *("fell", "into", "reached", "step", "limit"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Spaces and tabs only separate. A notice and a move without effect are one token each, so that boards stay aligned.
_PIECES = r"blocked\n|(?:Up|Down|Left|Right) \(no effect\)|\n|</?prompt>|[^\s<]+|<"


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = [*SPECIAL, *WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], byte_fallback=True, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(" \n", "\n"),
            decoders.Replace("\n ", "\n"),
        ]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model(seed: int) -> Qwen3ForCausalLM:
    """Untrained; the same seed gives the same weights."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Qwen3ForCausalLM = Qwen3ForCausalLM(config).float()
        return model


def write_untrained(path: Path, seed: int = 0) -> Path:
    """Writes a model folder with the shape of the embedded model, but untrained weights."""
    build_model(seed).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path
