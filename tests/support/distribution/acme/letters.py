"""An embedder that counts letters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mulligan.memory import EmbedderSettings


class Settings(EmbedderSettings):
    """An alphabet."""

    alphabet: str = Field("abcdefghijklmnopqrstuvwxyz", min_length=1, description="The letters that are counted.")


class Letters:
    def __init__(self, alphabet: str) -> None:
        self.name = f"letters/{alphabet}"
        self.size = len(alphabet)
        self._alphabet = alphabet

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = [[text.count(letter) for letter in self._alphabet] for text in texts]
        counts = np.array(rows, np.float32).reshape(len(texts), self.size)
        lengths = np.linalg.norm(counts, axis=1, keepdims=True)
        vectors: NDArray[np.float32] = np.divide(counts, lengths, out=np.zeros_like(counts), where=lengths > 0)
        return vectors


def create(settings: Settings) -> Letters:
    return Letters(settings.alphabet)
