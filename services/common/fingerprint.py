"""Fingerprint of a model: weights with the same fingerprint can be served or trained on by the same model.

Policy and trainer compute it independently and compare. It covers architecture and tokenizer but not the weights, so it
stays the same while a model learns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Entries of a configuration that do not change what the weights mean: origin, precision, versions, output options.
# Names with a leading underscore are left out, too.
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
# Parts of a tokenizer that calls change; the vocabulary does not depend on them.
_TOKENIZER_STATE = ("padding", "truncation")


def fingerprint(
    config: Mapping[str, object], parameters: Iterable[tuple[str, Sequence[int]]], tokenizer_json: str
) -> str:
    """Returns a lower-case hexadecimal SHA-256.

    `config` is the model's configuration as a dictionary. `parameters` are the names and shapes of its parameters in
    any order, tied ones once. `tokenizer_json` is the content of tokenizer.json.
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
    """The fingerprint of a transformers model without adapters, and of its fast tokenizer."""
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
