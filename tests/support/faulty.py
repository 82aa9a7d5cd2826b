"""The transformers backend with an engine that loads something else than it is told to, and says that it did not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mulligan.common.inference import Feature, WeightsKind
from mulligan.policy.backend import Admission, Replica, WeightsFile
from mulligan.policy.backends.transformers.backend import TransformersBackend
from mulligan.policy.model_settings import ModelSettings
from mulligan.testing.weights import sha256

Fault = Callable[["FaultyBackend", WeightsFile], WeightsFile]


class FaultyBackend(TransformersBackend):
    """`faults` are used up by one update each; without any it works as it should."""

    def __init__(self, settings: ModelSettings, first_version: int = 0):
        super().__init__(settings, None, first_version)
        self.faults: list[Fault | Exception] = []
        self.loaded = [WeightsFile(None, WeightsKind.ORIGINAL, first_version, "")]  # what it holds, last; and held

    async def update_weights(self, weights: WeightsFile, admit: Admission) -> None:
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        actual = weights if fault is None else fault(self, weights)
        self.loaded.append(actual)

        async def admit_as_told(replica: Replica, _: WeightsFile) -> None:
            await admit(replica, weights)

        await super().update_weights(replace(actual, policy_version=weights.policy_version), admit_as_told)


def skipped(backend: FaultyBackend, _: WeightsFile) -> WeightsFile:
    return backend.loaded[-1]


def previous(backend: FaultyBackend, _: WeightsFile) -> WeightsFile:
    return backend.loaded[-2]


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Fault:
    """The file with changed tensors."""

    def load(_: FaultyBackend, weights: WeightsFile) -> WeightsFile:
        assert weights.safetensors is not None
        tensors = load_file(weights.safetensors)
        change(tensors)
        path = folder / f"changed-{weights.policy_version}.safetensors"
        save_file(tensors, path)
        return replace(weights, path=path, sha256=sha256(path))

    return load


def corrupted(tensors: dict[str, torch.Tensor]) -> None:
    """The second half of one tensor is zeros: a read that broke off."""
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[tensors[name].numel() // 2 :] = 0


def swapped(tensors: dict[str, torch.Tensor]) -> None:
    """Two tensors of the same shape in each other's place."""
    first = "model.layers.0.mlp.gate_proj.weight"
    second = "model.layers.0.mlp.up_proj.weight"
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()


class ForgetfulBackend(FaultyBackend):
    """It can give its memory back, and then has lost its weights."""

    def __init__(self, settings: ModelSettings, first_version: int = 0):
        super().__init__(settings, first_version)
        self._info = replace(self._info, features=self._info.features | {Feature.MEMORY_RELEASE})
        self.released = False

    async def release_memory(self) -> None:
        self.released = True
        with torch.no_grad():
            for parameter in self._model.module.parameters():
                parameter.zero_()

    async def resume_memory(self) -> None:
        self.released = False
