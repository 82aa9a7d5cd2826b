"""An encoder for tests: `encoder = "tests.support.encoders"`. Counts letters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt


class LetterCounts:
    def __init__(self, letters: str) -> None:
        self._letters = letters
        self.encoded = 0  # passages

    def encode(self, texts: Sequence[str], *, query: bool) -> npt.NDArray[np.float32]:
        self.encoded += 0 if query else len(texts)
        counts = np.array([[text.lower().count(letter) for letter in self._letters] for text in texts], np.float32)
        lengths = np.linalg.norm(counts, axis=1, keepdims=True)
        return np.asarray(counts / np.maximum(lengths, 1e-6), np.float32)


def create(settings: Mapping[str, str]) -> LetterCounts:
    return LetterCounts(settings.get("letters", "abcdefghijklmnopqrstuvwxyz"))
