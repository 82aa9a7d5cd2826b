"""WordLlama's vectors, against the package's own `embed`."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from mulligan.memory.embedders.wordllama import Settings, create

wordllama = pytest.importorskip("wordllama")
TEXTS = ["The dog sleeps near the fire.", "A puppy is resting.", "Count the coins twice.", "été 🧊 \x00"]


def test_vectors_are_those_of_the_package() -> None:
    handlers, level = logging.root.handlers[:], logging.root.level
    embedder = create(Settings())
    assert (logging.root.handlers, logging.root.level) == (handlers, level), "it leaves logging alone"
    found = embedder.embed(TEXTS)
    assert found.dtype == np.float32 and found.shape == (4, 256) == (4, embedder.size)
    own = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
    assert np.allclose(found, own.embed(TEXTS, norm=True), atol=1e-6)
    assert found[0] @ found[1] > found[0] @ found[2]


def test_nothing_to_embed_is_zero_and_long_texts_fit() -> None:
    embedder = create(Settings())
    assert embedder.embed([]).shape == (0, 256)
    found = embedder.embed(["", "word " * 100_000, "word"])
    assert not found[0].any()
    assert np.allclose(np.linalg.norm(found[1:], axis=1), 1)
    assert found[1] @ found[2] > 0.9
