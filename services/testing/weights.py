"""Weights as a trainer would publish them, and log-probabilities computed by transformers' own code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mulligan.common.inference import PublishedWeights, WeightsKind


@torch.inference_mode()
def plain_log_probs(model: Any, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Of each token after the first, by transformers' own code, one sequence at a time."""
    ids = torch.tensor([list(token_ids)])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    picked: list[float] = torch.log_softmax(logits / temperature, -1).gather(1, ids[0, 1:, None])[:, 0].tolist()
    return picked


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True).eval()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def full_weights(
    path: Path, tensors: Mapping[str, torch.Tensor], version: int, fingerprint: str, **changes: Any
) -> PublishedWeights:
    """Writes the file and describes it."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    plain: dict[str, Any] = {
        "policy_version": version,
        "kind": WeightsKind.FULL,
        "uri": path.resolve().as_uri(),
        "sha256": sha256(path),
        "fingerprint": fingerprint,
    }
    return PublishedWeights(**(plain | changes))
