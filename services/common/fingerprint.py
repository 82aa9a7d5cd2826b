"""The identity of a model: what weights must have been made for, to be served or trained on further.

Policy and trainer compute it independently and compare; it covers the architecture and the tokenizer, not the weights,
so it stays the same while a model learns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Where a model was loaded from, in which precision, by which version and what it should return: none of it says what
# the weights mean. Names with a leading underscore are such, too.
_INCIDENTAL = frozenset(
    [
        "architectures",
        "attn_implementation",
        "dtype",
        "experts_implementation",
        "id2label",
        "label2id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "tie_weights",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
# State of a tokenizer that calls change, and that no vocabulary depends on.
_TOKENIZER_STATE = ("padding", "truncation")


def fingerprint(
    config: Mapping[str, object], parameters: Iterable[tuple[str, Sequence[int]]], tokenizer_json: str
) -> str:
    """Lower-case hexadecimal SHA-256.

    `config` is the model's configuration as a dictionary, `parameters` the names and shapes of its parameters, tied
    ones once, in any order; `tokenizer_json` is the content of a tokenizer.json file.
    """
    tokenizer = json.loads(tokenizer_json)
    for name in _TOKENIZER_STATE:
        tokenizer.pop(name, None)
    content = {
        "config": _essential(config),
        "parameters": sorted((name, [int(size) for size in shape]) for name, shape in parameters),
        "tokenizer": tokenizer,
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def model_fingerprint(model: Any, tokenizer: Any) -> str:
    """Of a transformers model, before any adapter is attached to it, and its (fast) tokenizer."""
    parameters = ((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    return fingerprint(model.config.to_dict(), parameters, tokenizer.backend_tokenizer.to_str())


def _essential(value: object) -> object:
    if isinstance(value, Mapping):
        return {
            str(key): _essential(item)
            for key, item in value.items()
            if str(key) not in _INCIDENTAL and not str(key).startswith("_")
        }
    if isinstance(value, list | tuple):
        return [_essential(item) for item in value]
    return value
