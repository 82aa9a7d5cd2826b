"""Checks whether a folder holds a language model that can be loaded, and names the bad file if not.

Loaders of models report damaged files badly or not at all: a missing tokenizer becomes an empty one. So policy and
trainer call this module before they load anything. It needs no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mulligan.common.safetensors_header import BadSafetensors, TensorHeader, read_header

# Name of a repository at the hub, with or without its owner.
# https://huggingface.co/docs/huggingface_hub/package_reference/utilities
# What the hub takes as the id of a repository: `validate_repo_id` of huggingface_hub.
_HUB_ID = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)([A-Za-z0-9]([\w.-]{0,94}\w)?/)?[A-Za-z0-9]([\w.-]{0,94}\w)?")
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024  # at most
_TOKENIZER = "tokenizer.json"
# Files of a tokenizer without that file.
_VOCABULARY = re.compile(r"vocab\..+|.+\.(model|tiktoken)|tekken\.json|tokenizer-.+")
_WHOLE = "model.safetensors"
_SHARDED = "model.safetensors.index.json"
_PICKLED = {"pytorch_model.bin", "pytorch_model.bin.index.json"}
# Files that loaders read if they exist.
_JSON = (
    *("config.json", "generation_config.json", _TOKENIZER, "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", _SHARDED),
)
_MESSAGE_LENGTH = 1000
_LAYER = re.compile(r"(.*\blayers|.*\bh)\.(\d+)\.")


class UnsupportedModel(Exception):
    """A model cannot be loaded or computed correctly. The message says why."""


def is_hub_id(source: str) -> bool:
    """Whether `source` names a repository at the hub and not a path."""
    # `Path.exists` raises OSError for a long name.
    return bool(_HUB_ID.fullmatch(source)) and not os.path.exists(source)


def short(error: Exception) -> str:
    """The message of a library, cut."""
    return str(error)[:_MESSAGE_LENGTH] or type(error).__name__


def check_model(source: str, *, weights: bool = True) -> None:
    """Checks a model folder. A hub id passes, because its files are not here yet. Without `weights`, the weights may be
    elsewhere.

    Raises UnsupportedModel, which names the file.
    """
    if is_hub_id(source):
        return
    try:
        _check_folder(Path(source), weights=weights)
    except _BadFile as error:
        raise UnsupportedModel(f"{source}: {error}") from error
    except OSError as error:
        raise UnsupportedModel(f"{error.filename or source}: {error.strerror or error}") from error


def layer_count(config: Any) -> int:
    """Number of layers of a text model, including the extra layers that some have for speculative decoding."""
    return int(config.num_hidden_layers) + int(getattr(config, "num_nextn_predict_layers", None) or 0)


def context_length(config: Any) -> int:
    """How many tokens a sequence of a text model may have; 0 if its configuration does not say.

    Positions of the kind "longrope" (Phi) are computed otherwise beyond the length of the first training, for all
    sequences of a pass as soon as one is longer. So such a model has that length: within it, what is computed for a
    sequence does not depend on the others. https://huggingface.co/docs/transformers/internal/rope_utils
    """
    found = int(getattr(config, "max_position_embeddings", 0) or 0)
    positions = getattr(config, "rope_parameters", None) or {}
    # Some architectures have such settings for each type of layer.
    kinds = [positions, *(kind for kind in positions.values() if isinstance(kind, Mapping))]
    first = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min([found, *(int(length) for length in first if length)])


def check_loaded(source: str, info: Mapping[str, Iterable[Any]], layers: int) -> None:
    """Checks the loading info of transformers (`output_loading_info`, `ignore_mismatched_sizes`) for a model of
    `layers` layers: missing weights would be random numbers. Raises UnsupportedModel."""
    wrong = sorted((str(name), list(found), list(expected)) for name, found, expected in info["mismatched_keys"])
    if wrong:
        raise UnsupportedModel(f"{source}: {_other_size(*wrong[0])}{_and_more(len(wrong))}")
    if missing := sorted(info["missing_keys"]):
        raise UnsupportedModel(f"{source} lacks {len(missing)} of its weights, first {missing[0]}")
    _refuse_more_layers(source, info["unexpected_keys"], layers)


def check_weights(source: str, expected: Mapping[str, Iterable[int]], layers: int) -> None:
    """Compares the shapes in a folder's safetensors files with the expected ones, for tensors that both have. Raises
    UnsupportedModel."""
    if is_hub_id(source):
        return
    found = _tensors(Path(source))
    wrong = [
        (name, list(tensor.shape), list(expected[name]))
        for name, tensor in sorted(found.items())
        if name in expected and tensor.shape != tuple(expected[name])
    ]
    if wrong:
        raise UnsupportedModel(f"{source}: {_other_size(*wrong[0])}{_and_more(len(wrong))}")
    _refuse_more_layers(source, found, layers)


def _refuse_more_layers(source: str, names: Iterable[str], layers: int) -> None:
    """Refuses weights of layers that the configuration lacks: loaders would ignore them."""
    for name in sorted(names):
        found = _LAYER.match(name)
        if found and int(found[2]) >= layers:
            raise UnsupportedModel(f"{source}: the weights contain {name}, but config.json has {layers} layers")


class _BadFile(Exception):
    """A bad file; the message begins with its name."""


def _check_folder(folder: Path, *, weights: bool) -> None:
    if not os.path.exists(folder):
        raise _BadFile("there is no such folder")
    if not folder.is_dir():
        raise _BadFile("not a folder; expected the folder with config.json, the tokenizer and the weights of a model")
    names = {path.name for path in folder.iterdir()}
    if not names:
        raise _BadFile("the folder is empty")
    _refuse_adapter(folder, names)
    found = {name: _object(folder / name) for name in _JSON if name in names}
    _check_config(found.get("config.json"))
    for name in ("config.json", "generation_config.json"):
        _check_special_tokens(name, found.get(name, {}))
    _check_tokenizer(folder, names)
    if weights:
        _check_weights(folder, names)


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        content = file.read(_POINTER_BYTES)
    if content.startswith(_POINTER):
        size = re.search(rb"^size (\d+)$", content, re.MULTILINE)
        of = f" of {int(size[1]):,} bytes" if size else ""
        raise _BadFile(f"{path.name} is a git-LFS pointer; the file{of} was not fetched: run `git lfs pull`")


def _refuse_adapter(folder: Path, names: set[str]) -> None:
    if "adapter_config.json" not in names:
        return
    base = _object(folder / "adapter_config.json").get("base_model_name_or_path") or "not named"
    raise _BadFile(
        f"adapter_config.json: the folder holds an adapter, not a model; expected its base model ({base}). "
        "Give the adapter to the base model with UpdateWeights or the setting `adapters`, or merge it first"
    )


def _check_config(config: Mapping[str, Any] | None) -> None:
    if config is None:
        raise _BadFile("config.json is missing")
    if not isinstance(config.get("model_type"), str):
        raise _BadFile("config.json has no model_type")


def _check_special_tokens(name: str, content: Mapping[str, Any]) -> None:
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = content.get(field)
        ids = value if isinstance(value, list) and field == "eos_token_id" else [] if value is None else [value]
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
            raise _BadFile(f"{name}: {field} = {json.dumps(value)[:100]}: expected a token id")


def _check_tokenizer(folder: Path, names: set[str]) -> None:
    parts = sorted(filter(_VOCABULARY.fullmatch, names))
    if _TOKENIZER not in names and not parts:
        raise _BadFile(f"no tokenizer: expected {_TOKENIZER}, or the vocabulary files of an older tokenizer")
    for name in [_TOKENIZER] if _TOKENIZER in names else parts:
        _refuse_pointer(folder / name)
    if "chat_template.jinja" in names:
        _refuse_pointer(folder / "chat_template.jinja")


def _check_weights(folder: Path, names: set[str]) -> None:
    """Checks the file that transformers would load."""
    if _WHOLE in names:
        _header(folder / _WHOLE)
    elif _SHARDED in names:
        _check_shards(folder)
    elif found := sorted(_PICKLED & names):
        raise _BadFile(
            f"{found[0]}: a pickle can run code when it is loaded: expected {_WHOLE}. Where you trust the file, "
            "transformers converts it: load the model and call save_pretrained"
        )
    else:
        raise _BadFile(f"no weights: expected {_WHOLE}, or {_SHARDED} with its shards")


def _check_shards(folder: Path) -> None:
    places = _weight_map(folder / _SHARDED)
    tensors = {shard: _header(_shard(folder, _SHARDED, shard)) for shard in sorted(set(places.values()))}
    for name, shard in sorted(places.items()):
        if name not in tensors[shard]:
            raise _BadFile(f"{shard} lacks {name}, which {_SHARDED} lists there")


def _shard(folder: Path, index: str, name: str) -> Path:
    path = folder / name
    if Path(name).name != name or not os.path.isfile(path):
        raise _BadFile(f"{name} is missing, but {index} lists it")
    return path


def _weight_map(index: Path) -> dict[str, str]:
    places = _object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise _BadFile(f"{index.name} has no weight_map from tensor names to files")
    return places


def _header(path: Path) -> dict[str, TensorHeader]:
    _refuse_pointer(path)
    try:
        return read_header(path)
    except BadSafetensors as error:
        raise _BadFile(f"{path.name} is {error}") from error


def _tensors(folder: Path) -> dict[str, TensorHeader]:
    if (folder / _WHOLE).is_file():
        return _header(folder / _WHOLE)
    if not (folder / _SHARDED).is_file():
        return {}
    shards = sorted(set(_weight_map(folder / _SHARDED).values()))
    return {name: tensor for shard in shards for name, tensor in _header(folder / shard).items()}


def _object(path: Path) -> Mapping[str, Any]:
    _refuse_pointer(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _BadFile(f"{path.name} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise _BadFile(f"{path.name} is not a JSON object")
    return value


def _other_size(name: str, found: list[int], expected: list[int]) -> str:
    return f"{name} has shape {found}, but config.json implies {expected}"


def _and_more(count: int) -> str:
    return f"; {count} tensors have wrong shapes" if count > 1 else ""
