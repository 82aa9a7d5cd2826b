"""Loads new weights into a running model. They are read and verified completely before anything is changed.

A full file replaces every parameter. A LoRA adapter is merged into the weights that the model came with,
W = W0 + scale * B A, no matter which version was served before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import WeightsKind
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy import adapter_config
from mulligan.policy.adapter_config import AdapterConfig, mismatch
from mulligan.policy.backend import WeightsFile
from mulligan.policy.huggingface.adapters import factors_of, places_of


class Weights:
    """The parameters of one module. `load_original` loads the module again, with its original weights."""

    def __init__(self, module: torch.nn.Module, load_original: Callable[[], torch.nn.Module]):
        self._module = module
        self._load_original = load_original
        self._parameters, self._names = _parameters(module)
        self._changed: set[str] = set()
        self._originals: dict[str, torch.Tensor] = {}

    def read(self, weights: WeightsFile) -> dict[str, torch.Tensor]:
        """The verified new values of all parameters that change. Raises DomainError MODEL_MISMATCH,
        WEIGHTS_NOT_FOUND."""
        if weights.path is None or weights.safetensors is None:
            parameters, _ = self._load()
            return parameters
        tensors = _read(weights.safetensors)
        if weights.kind is WeightsKind.FULL:
            return self._full(tensors)
        return self._merged(tensors, AdapterConfig.read(weights.path / adapter_config.NAME))

    @torch.no_grad()
    def apply(self, tensors: Mapping[str, torch.Tensor], kind: WeightsKind) -> None:
        """Writes what `read` returned, which cannot fail. No request may run meanwhile."""
        for name, tensor in tensors.items():
            self._parameters[name].copy_(tensor)
        if kind is WeightsKind.ORIGINAL:
            self._changed = set()
            self._originals = {}
        elif kind is WeightsKind.FULL:
            self._changed = set(tensors)
            self._originals = {}
        else:
            self._changed = {name for name in tensors if tensors[name] is not self._originals.get(name)}
            self._originals = {name: self._originals[name] for name in self._changed}

    def checksum(self) -> Iterator[str]:
        """SHA-256 of the names, types, shapes and bytes of all tensors of the module. Yields the digest after each
        tensor.

        It comes in steps because gigabytes take seconds. Nothing may change the weights meanwhile.
        """
        digest = hashlib.sha256()
        parameters, _ = _parameters(self._module)
        for name in sorted(parameters):
            tensor = parameters[name].detach()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            yield digest.hexdigest()

    def close(self) -> None:
        """Forgets all tensors. Nothing may use them any longer."""
        self._parameters = {}
        self._originals = {}

    def _full(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            canonical = self._names.get(name)
            if canonical is None:
                raise mismatch(f"the model has no parameter {name}")
            if canonical in result:
                raise mismatch(f"{name} is in the file twice, under two names that are tied to each other")
            self._check_shape(canonical, tensor.shape)
            result[canonical] = tensor
        if missing := sorted(set(self._parameters) - set(result)):
            raise mismatch(f"{len(missing)} parameters are missing, first {missing[0]}")
        return result

    def _merged(self, tensors: dict[str, torch.Tensor], config: AdapterConfig) -> dict[str, torch.Tensor]:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        factors = factors_of(config, shapes, places_of(self._module))
        names = {module: self._names[f"{module}.weight"] for module in factors}
        originals = self._original([*names.values(), *self._changed])
        result = {name: originals[name] for name in self._changed}
        for module, name in names.items():
            found = factors[module]
            product = tensors[found.up].float() @ tensors[found.down].float()
            result[name] = originals[name].float() + config.scale(found.rank) * product
            if not bool(torch.isfinite(result[name]).all()):
                raise mismatch(f"the adapter of {module} gives weights that are not finite numbers")
        self._originals = originals
        return result

    def _original(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        wanted = set(names)
        if not wanted <= set(self._originals):
            parameters, _ = self._load()
            return {name: parameters[name] for name in wanted}
        return {name: self._originals[name] for name in wanted}

    def _load(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        try:
            return _parameters(self._load_original())
        except UnsupportedModel as error:
            raise DomainError(Reason.WEIGHTS_NOT_FOUND, f"what the model came with: {error}") from error

    def _check_shape(self, name: str, shape: Iterable[int]) -> None:
        expected = list(self._parameters[name].shape)
        if list(shape) != expected:
            raise mismatch(f"{name} has shape {list(shape)}; the model's is {expected}")


def _parameters(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Parameters and persistent buffers by name, tied ones once; and for each name of a tied tensor, the one used
    here."""
    by_identity: dict[int, str] = {}
    parameters: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names[name] = by_identity.setdefault(id(tensor), name)
        parameters.setdefault(names[name], tensor.detach())
    return parameters, names


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except FileNotFoundError as error:
        raise DomainError(Reason.WEIGHTS_NOT_FOUND, f"{path.name} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise mismatch(f"{path.name} is not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise mismatch(f"{name} holds values that are not finite numbers")
    return tensors
