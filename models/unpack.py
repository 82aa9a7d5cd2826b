"""Unpacks a GGUF file into a folder that transformers loads: python -m mulligan.models.unpack FILE FOLDER.

The weights become bfloat16. The last line of the output is their SHA-256, as JSON. It covers name, type, shape and
bytes of each tensor in the order of the names, so it does not depend on how a version of safetensors lays out its file.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def unpack(file: Path, folder: Path) -> str:
    """Writes configuration, weights, tokenizer and chat template. Returns the SHA-256 of the weights."""
    # Dequantized when it is loaded: https://huggingface.co/docs/transformers/gguf
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.__dict__.pop("quantization_config", None)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return weights_sha256(load_file(folder / "model.safetensors"))


def weights_sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(json.dumps({"weights_sha256": unpack(Path(sys.argv[1]), Path(sys.argv[2]))}))
