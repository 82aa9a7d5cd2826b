"""Compares the weights of two files, after rounding to the precision that an engine computes in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from mulligan import models
from mulligan.common.inference import WeightsKind
from mulligan.policy.backend import WeightsFile


def alike(first: WeightsFile, second: WeightsFile, dtype: str) -> bool:
    """Whether both are of the same kind, and equal after rounding to `dtype`, a torch name."""
    if first.kind is not second.kind or first.safetensors is None or second.safetensors is None:
        return False
    if first.kind is WeightsKind.LORA and _config(first) != _config(second):
        return False
    return _equal([first.safetensors], [second.safetensors], dtype)


def alike_original(weights: WeightsFile, model: str, dtype: str, revision: str = "") -> bool:
    """Whether weights equal those that a model, a folder or a hub id at a revision, came with. An adapter does if it
    adds nothing.

    Also True if the model has no safetensors files on this machine, since then nothing can be compared.
    """
    if weights.safetensors is None:
        return False
    if weights.kind is WeightsKind.LORA:
        return _adds_nothing(weights.safetensors)
    folder = Path(models.locate(model, revision))
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (OSError, ValueError):
            return True
    originals = sorted(folder.glob("*.safetensors"))
    return not originals or _equal([weights.safetensors], originals, dtype)


def _equal(first: list[Path], second: list[Path], dtype: str) -> bool:
    """Compares the tensors that both sides have. Others are second names of tied tensors: both files were found
    complete when they were loaded."""
    places = {name: path for path in second for name in _names(path)}
    kind = getattr(torch, dtype, None)
    compared = 0
    for path in first:
        for name in _names(path):
            if name not in places:
                continue
            one, other = (_tensor(place, name) for place in (path, places[name]))
            if isinstance(kind, torch.dtype):
                one = one.to(kind)
                other = other.to(kind)
            if one.shape != other.shape or not torch.equal(one, other):
                return False
            compared += 1
    return compared > 0


def _adds_nothing(adapter: Path) -> bool:
    return all(not bool(_tensor(adapter, name).any()) for name in _names(adapter) if ".lora_B." in name)


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return []


def _tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt", device="cpu") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _config(weights: WeightsFile) -> object:
    assert weights.path is not None
    return json.loads((weights.path / "adapter_config.json").read_text())
