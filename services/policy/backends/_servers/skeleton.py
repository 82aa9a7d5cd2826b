"""What is known of a model without its weights: configuration, tokenizer, names and shapes of its parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from mulligan.common.errors import DomainError, Reason
from mulligan.common.fingerprint import model_fingerprint
from mulligan.common.model_files import UnsupportedModel, check_model, check_weights, layer_count, short
from mulligan.policy import adapter_config
from mulligan.policy.adapter_config import AdapterConfig, mismatch
from mulligan.policy.huggingface.adapters import factors_of, places_of
from mulligan.policy.huggingface.tokenizer import Tokenizer

ADAPTER_FILE = "adapter_model.safetensors"
_ADAPTER_PREFIX = "base_model.model."
# Layers that SGLang stacks into one. A server dies when an adapter has some of them and lacks others.
STACKED: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Skeleton:
    """The skeleton of a hub id or a folder; `name` is what settings call it. It takes seconds to make, and for a hub id
    the network. Without `weights` the folder need not hold any, because the servers have them. Raises UnsupportedModel.
    """

    def __init__(self, source: str, *, weights: bool = True, name: str = ""):
        self.source = source
        self.name = name or source
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
        self.dtype = str(getattr(self.config, "dtype", None) or torch.float32).removeprefix("torch.")
        self._shapes, self._tied = _shapes(module)
        self._places = places_of(module)
        if weights:
            check_weights(source, self._shapes, layer_count(text))

    @property
    def names(self) -> set[str]:
        """A server that has the model says that its own has one of these."""
        return {last_name(self.source), last_name(self.name)}

    def check_full(self, path: Path) -> None:
        """Checks that a file has every parameter once, with the model's name and shape, and finite values.

        The servers would load a part of a wrong file and then fail, or silently leave out what they do not know.
        Raises DomainError MODEL_MISMATCH, WEIGHTS_NOT_FOUND.
        """
        missing = dict(self._shapes)
        with _opened(path) as file:
            for name in sorted(file.keys()):
                if name not in self._shapes:
                    known_as = self._tied.get(name)
                    raise mismatch(
                        f"{name} is tied to {known_as}, and is to be left out" if known_as else _no_parameter(name)
                    )
                _check_shape(name, _shape(file, name), missing.pop(name))
                _check_values(file, name)
        if missing:
            raise mismatch(f"{len(missing)} parameters are missing, first {min(missing)}")

    def check_adapter(self, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The adapter of a folder as the servers need it: its configuration and its tensors, those of the file and, for
        layers that SGLang wants, factors that change nothing. No tensors if the file is right as it is.

        Raises DomainError MODEL_MISMATCH, WEIGHTS_NOT_FOUND.
        """
        config = AdapterConfig.read(folder / adapter_config.NAME)
        with _opened(folder / ADAPTER_FILE) as file:
            shapes = {key: _shape(file, key) for key in sorted(file.keys())}
            factors = factors_of(config, shapes, self._places)
            for key in shapes:
                _check_values(file, key)
            ranks = {found.rank for found in factors.values()}
            if len(ranks) > 1:
                raise mismatch(f"the adapter has ranks {sorted(ranks)}; the servers take one rank for all layers")
            [rank] = ranks
            missing = self._missing(factors)
            if not missing:
                return _for_servers(config, factors, rank), {}
            completed = {key: file.get_tensor(key) for key in shapes}
            dtype = next(iter(completed.values())).dtype
            for module in missing:
                rows, columns = self._shapes[f"{module}.weight"]
                completed[f"{_ADAPTER_PREFIX}{module}.lora_A.weight"] = torch.zeros((rank, columns), dtype=dtype)
                completed[f"{_ADAPTER_PREFIX}{module}.lora_B.weight"] = torch.zeros((rows, rank), dtype=dtype)
            return _for_servers(config, [*factors, *missing], rank), completed

    def _missing(self, adapted: Collection[str]) -> list[str]:
        """Layers without an adapter that are stacked with adapted ones. SGLang needs an adapter for them, too."""
        missing = set()
        for module in adapted:
            parent, _, leaf = module.rpartition(".")
            [group] = [group for group in STACKED if leaf in group] or [()]
            missing |= {f"{parent}.{name}" for name in group if f"{parent}.{name}.weight" in self._shapes}
        return sorted(missing.difference(adapted))


def last_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _for_servers(config: AdapterConfig, modules: Collection[str], rank: int) -> dict[str, Any]:
    """The configuration for the servers. SGLang scales by lora_alpha / r, whatever use_rslora says. No server knows
    patterns of names or ranks."""
    alpha = config.scale(rank) * rank
    names = sorted({module.rpartition(".")[2] for module in modules})
    plain = {"use_rslora": False, "rank_pattern": {}, "target_modules": names}
    return {**config.content, **plain, "r": rank, "lora_alpha": alpha}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, from which one tensor at a time is read."""
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise DomainError(Reason.WEIGHTS_NOT_FOUND, f"{path.name} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise mismatch(f"{path.name} is not a safetensors file: {error}") from error
    with file:
        yield file


def _shape(file: Any, name: str) -> list[int]:
    return list(file.get_slice(name).get_shape())


def _check_values(file: Any, name: str) -> None:
    tensor = file.get_tensor(name)
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        raise mismatch(f"{name} holds values that are not finite numbers")


def _shapes(module: Any) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Shapes of parameters and persistent buffers by name, of tied ones under one name; and for each other name of a
    tied one, that name."""
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


def _check_shape(name: str, shape: list[int], expected: list[int]) -> None:
    if shape != expected:
        raise mismatch(f"{name} has shape {shape}; the model's is {expected}")


def _no_parameter(name: str) -> str:
    return f"the model has no parameter {name}"
