"""WordLlama: the mean of the vectors of a text's tokens, 256 numbers. Its package brings the weights (16 MB), and a
processor embeds thousands of short texts a second. https://github.com/dleemiller/WordLlama

The vectors are those of its own `embed(texts, norm=True)`, but for rounding, and for texts of more than 4,096
characters, which are cut into parts of that length. Its own pads all texts of a call to the longest, which takes
gigabytes beside a long text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mulligan.common.extras import MissingExtra
from mulligan.memory.embedder import EmbedderSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MODEL = "l2_supercat"
_CHARACTERS = 4096  # tokenized at once


class Settings(EmbedderSettings):
    """WordLlama."""


class WordLlamaEmbedder:
    def __init__(self) -> None:
        with _logging_unchanged():
            import wordllama

            folder = Path(wordllama.__file__).parent  # the package looks for its tokenizer in a cache alone
            model = wordllama.WordLlama.load(_MODEL, cache_dir=folder, disable_download=True)
        self.name = f"wordllama/{version('wordllama')}/{_MODEL}"
        self._vectors = model.embedding
        self._tokenizer: Any = model.tokenizer
        self._tokenizer.no_padding()

    @property
    def size(self) -> int:
        return int(self._vectors.shape[1])

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import numpy as np

        found = np.zeros((len(texts), self.size), np.float32)
        for row, text in zip(found, texts, strict=True):
            parts = [text[start : start + _CHARACTERS] for start in range(0, len(text), _CHARACTERS)]
            total = np.zeros(self.size)
            for encoded in self._tokenizer.encode_batch(parts, add_special_tokens=False):
                total += self._vectors[encoded.ids].sum(axis=0, dtype=np.float64)
            if length := np.linalg.norm(total):
                row[:] = total / length
        return found


def create(settings: Settings) -> WordLlamaEmbedder:
    """Raises MissingExtra."""
    try:
        return WordLlamaEmbedder()
    except ModuleNotFoundError as error:
        raise MissingExtra("memory-wordllama", error) from error


@contextmanager
def _logging_unchanged() -> Iterator[None]:
    """The package sets up logging for the whole process when it is imported."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
