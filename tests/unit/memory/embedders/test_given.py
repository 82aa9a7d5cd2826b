"""Vectors that callers bring."""

from __future__ import annotations

import pytest

from mulligan.memory.embedder import CannotEmbed
from mulligan.memory.embedders.given import Settings, create


def test_a_text_cannot_be_embedded() -> None:
    embedder = create(Settings(size=3, model="mine"))
    assert embedder.size == 3 and embedder.embed([]).shape == (0, 3)
    with pytest.raises(CannotEmbed, match="3 numbers"):
        embedder.embed(["text"])
    names = {create(Settings(size=size, model=model)).name for size in (3, 4) for model in ("a", "b")}
    assert len(names) == 4, "other vectors have another name"
