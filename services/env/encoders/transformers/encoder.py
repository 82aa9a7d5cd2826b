"""Text encoders from the Hugging Face hub or a folder: the last hidden states, pooled and scaled to length 1.

The defaults are those of E5, with which the published experiments searched: https://huggingface.co/intfloat/e5-base-v2
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from mulligan.common.devices import TorchDevices
from mulligan.env.encoders.transformers import Settings


class TransformersEncoder:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        if problem := TorchDevices.seen_by(torch).problem(settings.device, others=True):
            raise ValueError(f"device: {problem}")
        revision = settings.revision or "main"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(settings.model, revision=revision)
            model = AutoModel.from_pretrained(
                settings.model, revision=revision, dtype=torch.float32, use_safetensors=True
            )
            self._model = model.to(settings.device).eval()
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"model: {settings.model!r} cannot be loaded: {error}") from error
        self._lock = threading.Lock()  # a tokenizer's padding is state that its calls share

    def encode(self, texts: Sequence[str], *, query: bool) -> np.ndarray:
        prefix = self._settings.query_prefix if query else self._settings.passage_prefix
        with self._lock:
            batch = self._tokenizer(
                [prefix + text for text in texts],
                padding=True,
                truncation=True,
                max_length=self._settings.max_tokens,
                return_tensors="pt",
            ).to(self._settings.device)
        with torch.inference_mode():
            states = self._model(**batch).last_hidden_state
            if self._settings.pooling == "mean":
                mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
                states = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            else:
                states = states[:, 0]
            vectors: np.ndarray = torch.nn.functional.normalize(states, dim=-1).cpu().numpy()
        return vectors
