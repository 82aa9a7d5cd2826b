"""Finds, and checks, which tensors of a LoRA adapter belong to which layer of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mulligan.policy.adapter_config import AdapterConfig, mismatch

_PREFIX = "base_model.model."  # of every name in a file that peft writes
_DOWN = "lora_A"
_UP = "lora_B"


@dataclass(frozen=True, slots=True)
class Place:
    """A weight matrix of a model. `kind` is the class of its layer. `tied_to` names another module that has the same
    matrix; "" if none has."""

    shape: tuple[int, ...]
    kind: str
    linear: bool
    tied_to: str


@dataclass(frozen=True, slots=True)
class Factors:
    """The two factors of one layer: the tensor names of A [rank, inputs] and B [outputs, rank]."""

    down: str
    up: str
    rank: int


def places_of(model: torch.nn.Module) -> dict[str, Place]:
    """The weight matrices of the model, by the name of the module."""
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter)
    }
    holders: dict[int, list[str]] = {}
    for name, module in layers.items():
        holders.setdefault(id(module.weight), []).append(name)
    places = {}
    for name, module in layers.items():
        weight: Any = module.weight
        tied = [other for other in holders[id(weight)] if other != name]
        linear = isinstance(module, torch.nn.Linear)
        places[name] = Place(tuple(weight.shape), type(module).__name__, linear, tied[0] if tied else "")
    return places


def factors_of(
    config: AdapterConfig, shapes: Mapping[str, Sequence[int]], places: Mapping[str, Place]
) -> dict[str, Factors]:
    """The adapter's factors, by the name of the module. `shapes` are those of the file's tensors. Raises DomainError
    MODEL_MISMATCH."""
    names: dict[str, dict[str, str]] = {}
    for key in shapes:
        module, _, factor = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if factor not in (_DOWN, _UP) or module not in places:
            raise mismatch(f"the model has no place for {key}")
        if factor in names.setdefault(module, {}):
            raise mismatch(f"the adapter has {factor} of {module} twice")
        names[module][factor] = key
    if not names:
        raise mismatch("the adapter has no tensors")
    return {module: _checked(config, module, pair, shapes, places[module]) for module, pair in names.items()}


def _checked(
    config: AdapterConfig, module: str, pair: Mapping[str, str], shapes: Mapping[str, Sequence[int]], place: Place
) -> Factors:
    if len(pair) != 2:
        raise mismatch(f"the adapter of {module} lacks one of its two factors")
    down = list(shapes[pair[_DOWN]])
    up = list(shapes[pair[_UP]])
    if len(down) != 2 or len(up) != 2 or up[1] != down[0]:
        raise mismatch(f"the adapter of {module} has factors of shapes {up} and {down}")
    if not place.linear:
        raise mismatch(f"{module} is of the kind {place.kind}; expected adapters of linear layers")
    if place.tied_to:
        raise mismatch(
            f"{module} is tied to {place.tied_to}, which has the same weights: an adapter of one would change both"
        )
    if (up[0], down[1]) != place.shape:
        raise mismatch(f"{module} has shape {[up[0], down[1]]} in the adapter; the model's is {list(place.shape)}")
    config.check_layer(module, down[0])
    return Factors(pair[_DOWN], pair[_UP], down[0])
