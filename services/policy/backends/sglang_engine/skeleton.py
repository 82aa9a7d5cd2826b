"""What is known of a model without its weights: configuration, tokenizer, names and shapes of its parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from services.common.errors import DomainError, Reason
from services.common.fingerprint import model_fingerprint
from services.common.model_files import UnsupportedModel, check_model, check_weights, layer_count, short
from services.policy.backends.tokenizer import Tokenizer

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_ADAPTER_PREFIX = "base_model.model."
# Variants of LoRA that SGLang ignores or lacks, and the setting's value that leaves them off.
_PLAIN = {
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "alpha_pattern": {},
    "lora_bias": False,
}
# Layers that SGLang stacks into one. A server dies when an adapter has some of them and lacks others.
_STACKED: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Skeleton:
    """Of a hub id or a folder. Takes seconds, and the network for a hub id. Without `weights` the folder needs to hold
    none, because the servers have them. Raises UnsupportedModel."""

    def __init__(self, source: str, *, weights: bool = True):
        self.source = source
        check_model(source, weights=weights)
        self.tokenizer = Tokenizer.load(source)
        try:
            self.config: Any = AutoConfig.from_pretrained(source)
            with torch.device("meta"):
                module = AutoModelForCausalLM.from_config(self.config)
        except Exception as error:  # a loader fails in many ways, which mean the same to callers
            raise UnsupportedModel(f"{source} is no causal language model of transformers: {short(error)}") from error
        try:
            generation: object = GenerationConfig.from_pretrained(source)
        except (OSError, ValueError):
            generation = None
        self.end_of_turn = self.tokenizer.end_of_turn(self.config, generation)
        self.fingerprint = model_fingerprint(module, self.tokenizer.inner)
        text = self.config.get_text_config()
        self.vocabulary_size = int(text.vocab_size)
        self.model_type = str(self.config.model_type)
        self.architectures = list(self.config.architectures or ())
        self.dtype = str(getattr(self.config, "dtype", None) or torch.float32).removeprefix("torch.")
        self._shapes, self._tied = _shapes(module)
        if weights:
            check_weights(source, self._shapes, layer_count(text))

    def check_full(self, path: Path) -> None:
        """Every parameter once, by the name and in the shape that the model has, with finite values.

        SGLang would take a part of a file and then fail, or leave out silently what it does not know.
        Raises DomainError MODEL_MISMATCH, WEIGHTS_NOT_FOUND.
        """
        missing = dict(self._shapes)
        with _Reader(path) as tensors:
            for name in tensors.names:
                if name not in self._shapes:
                    known_as = self._tied.get(name)
                    raise _mismatch(
                        f"{name} is tied to {known_as}, and is to be left out" if known_as else _no_parameter(name)
                    )
                _check_shape(name, tensors.shape(name), missing.pop(name))
                tensors.check_values(name)
        if missing:
            raise _mismatch(f"{len(missing)} parameters are missing, first {min(missing)}")

    def check_adapter(self, folder: Path) -> dict[str, Any]:
        """The adapter's configuration as SGLang has to see it: it scales by lora_alpha / r, whatever use_rslora says.

        Raises DomainError MODEL_MISMATCH, WEIGHTS_NOT_FOUND.
        """
        config = _adapter_config(folder / ADAPTER_CONFIG)
        pairs: dict[str, dict[str, list[int]]] = {}
        with _Reader(folder / ADAPTER_FILE) as tensors:
            for key in tensors.names:
                module, _, factor = key.removeprefix(_ADAPTER_PREFIX).removesuffix(".weight").rpartition(".")
                name = f"{module}.weight"
                if factor not in ("lora_A", "lora_B") or (name not in self._shapes and name not in self._tied):
                    raise _mismatch(f"the model has no place for {key}")
                pairs.setdefault(self._tied.get(name, name), {})[factor] = tensors.shape(key)
                tensors.check_values(key)
        if not pairs:
            raise _mismatch("the adapter has no tensors")
        ranks = set()
        for name, pair in pairs.items():
            if len(pair) != 2:
                raise _mismatch(f"the adapter of {name} lacks one of its two factors")
            down, up = pair["lora_A"], pair["lora_B"]
            if len(down) != 2 or len(up) != 2 or up[1] != down[0]:
                raise _mismatch(f"the adapter of {name} has factors of shapes {up} and {down}")
            _check_shape(name, [up[0], down[1]], self._shapes[name])
            ranks.add(down[0])
        if len(ranks) > 1:
            raise _mismatch(f"the adapter has ranks {sorted(ranks)}; SGLang takes one rank for all layers")
        [rank] = ranks
        alpha = float(config["lora_alpha"])
        if config.get("use_rslora"):
            alpha *= math.sqrt(rank)
        return {**config, "r": rank, "lora_alpha": alpha, "use_rslora": False, "rank_pattern": {}}

    def completed_adapter(self, folder: Path, rank: int) -> dict[str, torch.Tensor]:
        """The tensors of an adapter that was checked, with factors that change nothing where SGLang needs some; empty
        when it needs none."""
        with _Reader(folder / ADAPTER_FILE) as tensors:
            parts = {key.removeprefix(_ADAPTER_PREFIX).rpartition(".lora_")[0]: key for key in tensors.names}
            added: dict[str, torch.Tensor] = {}
            for module, key in parts.items():
                parent, _, leaf = module.rpartition(".")
                [group] = [group for group in _STACKED if leaf in group] or [()]
                for other in (f"{parent}.{name}" for name in group):
                    if other in parts or f"{other}.weight" not in self._shapes:
                        continue
                    rows, columns = self._shapes[f"{other}.weight"]
                    for factor, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                        name = f"{_ADAPTER_PREFIX}{other}.lora_{factor}.weight"
                        added[name] = torch.zeros(shape, dtype=tensors.tensor(key).dtype)
            return {key: tensors.tensor(key) for key in tensors.names} | added if added else {}


class _Reader:
    """A safetensors file, one tensor at a time."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except FileNotFoundError as error:
            raise DomainError(Reason.WEIGHTS_NOT_FOUND, f"{path.name} does not exist") from error
        except (SafetensorError, OSError) as error:
            raise _mismatch(f"{path.name} is not a safetensors file: {error}") from error
        self.names = sorted(self._file.keys())

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        del self._file

    def shape(self, name: str) -> list[int]:
        return list(self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def check_values(self, name: str) -> None:
        tensor = self.tensor(name)
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise _mismatch(f"{name} holds values that are not finite numbers")


def _shapes(module: Any) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Of parameters and persistent buffers by name, tied ones once; and of the other names of tied ones, theirs."""
    by_identity: dict[int, str] = {}
    shapes: dict[str, list[int]] = {}
    tied: dict[str, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        known_as = by_identity.setdefault(id(tensor), name)
        if known_as == name:
            shapes[name] = list(tensor.shape)
        else:
            tied[name] = known_as
    return shapes, tied


def _adapter_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text())
        float(config["lora_alpha"])
    except FileNotFoundError as error:
        raise DomainError(Reason.WEIGHTS_NOT_FOUND, f"{path.name} does not exist") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _mismatch(f"{path.name} is not the configuration of a LoRA adapter: {error!r}") from error
    for name, value in _PLAIN.items():
        if config.get(name) not in (value, None, [], {}):
            raise _mismatch(f"{path.name}: {name} = {config[name]!r} is not supported")
    found: Mapping[str, Any] = config
    return found


def _check_shape(name: str, shape: list[int], expected: list[int]) -> None:
    if shape != expected:
        raise _mismatch(f"{name} has shape {shape}; the model's is {expected}")


def _no_parameter(name: str) -> str:
    return f"the model has no parameter {name}"


def _mismatch(message: str) -> DomainError:
    return DomainError(Reason.MODEL_MISMATCH, message)
