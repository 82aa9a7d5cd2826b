"""Which settings the adapter_config.json of a LoRA adapter may have: those that every backend computes as peft does.

Every backend computes W + scale * B A, in linear layers. peft has dozens of settings that mean more than that, and each
release adds some. So this module lists what is accepted, and refuses the rest.
https://huggingface.co/docs/peft/package_reference/lora
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mulligan.common.errors import DomainError, Reason

NAME = "adapter_config.json"
# Settings that change nothing of what a finished adapter computes, whatever their value.
_WITHOUT_EFFECT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "inference_mode",
        "lora_dropout",  # while training alone
        "megatron_core",  # with megatron_config alone
        "peft_version",
        "qalora_group_size",  # with use_qalora alone
        "revision",
        "runtime_config",
    ]
)
# Settings that say which layers have an adapter, and of which rank. The tensors of the file say the same; `check_layer`
# compares the two.
_PLACES = frozenset(["exclude_modules", "layers_pattern", "layers_to_transform", "rank_pattern", "target_modules"])
_READ = frozenset(["lora_alpha", "r"])
# What these settings may be, besides absent or null. Some values of init_lora_weights change the weights below the
# adapter (pissa, olora, corda, loftq, lora_ga): the adapter is of another base model then. After these it is not.
_ACCEPTED: Mapping[str, Collection[object]] = {
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "use_rslora": (True, False),
}
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # the first number in a module's name, as peft finds it


@dataclass(frozen=True)
class AdapterConfig:
    """`content` is the file's. `rank` and `alpha` are peft's r and lora_alpha."""

    content: Mapping[str, Any]
    rank: int
    alpha: float

    @classmethod
    def read(cls, path: Path) -> AdapterConfig:
        """Raises DomainError WEIGHTS_NOT_FOUND, MODEL_MISMATCH, which names the setting."""
        try:
            return cls.parse(path.read_bytes())
        except FileNotFoundError as error:
            raise DomainError(Reason.WEIGHTS_NOT_FOUND, f"{path.name} does not exist") from error
        except OSError as error:
            raise mismatch(f"{path.name} cannot be read: {error.strerror}") from error

    @classmethod
    def parse(cls, text: bytes) -> AdapterConfig:
        """Raises DomainError MODEL_MISMATCH, which names the setting."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise mismatch(f"{NAME} cannot be read as JSON: {error}") from error
        if not isinstance(content, dict):
            raise mismatch(f"{NAME} holds no JSON object")
        for name, value in content.items():
            _check(name, value)
        return cls(content, _rank("r", content.get("r")), _alpha(content.get("lora_alpha")))

    def scale(self, rank: int) -> float:
        """peft's lora_alpha / rank, or / sqrt(rank) where it is stabilised; `rank` is a layer's own."""
        return self.alpha / (math.sqrt(rank) if self.content.get("use_rslora") else rank)

    def check_layer(self, module: str, rank: int) -> None:
        """That the configuration gives this layer an adapter of this rank, too. Otherwise peft would leave out its
        tensors, or refuse them. Raises DomainError MODEL_MISMATCH."""
        if not self._targets(module):
            raise mismatch(f"{NAME}: target_modules leaves out {module}, which has an adapter in the file")
        ranks = {self.rank, *(self.content.get("rank_pattern") or {}).values()}
        if rank not in ranks:
            raise mismatch(f"the adapter of {module} has rank {rank}, and {NAME} says r = {self.rank}")

    def _targets(self, module: str) -> bool:
        """As peft chooses layers by lists of names. A pattern is not checked: the file was made by it."""
        targets = self.content.get("target_modules")
        excluded = self.content.get("exclude_modules")
        if isinstance(excluded, list) and _ends(module, excluded):
            return False
        if not isinstance(targets, list):
            return True
        layers = self.content.get("layers_to_transform")
        if not _ends(module, targets) or layers in (None, []):
            return _ends(module, targets)
        found = _LAYER.match(module)
        return found is not None and int(found[1]) in (layers if isinstance(layers, list) else [layers])


def mismatch(message: str) -> DomainError:
    return DomainError(Reason.MODEL_MISMATCH, message)


def _check(name: str, value: object) -> None:
    """A setting that is not listed, such as one of a later peft, passes only if it is switched off."""
    if value is None or name in _WITHOUT_EFFECT | _READ:
        return
    if name in _PLACES:
        _check_place(name, value)
    elif name in _ACCEPTED:
        if not any(value is known or (isinstance(known, str) and value == known) for known in _ACCEPTED[name]):
            expected = ", ".join(json.dumps(known) for known in _ACCEPTED[name])
            raise mismatch(f"{NAME}: {name} = {_shown(value)} is not supported: expected {expected}")
    elif value is not False and value not in ("", [], {}):
        raise mismatch(f"{NAME}: {name} = {_shown(value)} is not supported: expected it to be off, or left out")


def _check_place(name: str, value: object) -> None:
    if name == "rank_pattern":
        if not isinstance(value, dict):
            raise mismatch(f"{NAME}: {name} = {_shown(value)}: expected ranks by name")
        for key, rank in value.items():
            _rank(f"{name}.{key}", rank)
        return
    kinds: tuple[type, ...] = (str, list) if name != "layers_to_transform" else (int, list)
    item = int if name == "layers_to_transform" else str
    if not isinstance(value, kinds) or (isinstance(value, list) and not all(isinstance(each, item) for each in value)):
        raise mismatch(f"{NAME}: {name} = {_shown(value)}: expected names of layers, or their numbers")


def _rank(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise mismatch(f"{NAME}: {name} = {_shown(value)}: expected a whole number from 1")
    return value


def _alpha(value: object) -> float:
    try:
        alpha = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        alpha = math.inf
    if not math.isfinite(alpha):
        raise mismatch(f"{NAME}: lora_alpha = {_shown(value)}: expected a number")
    return alpha


def _ends(module: str, names: Collection[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _shown(value: object) -> str:
    return json.dumps(value)[:200]
