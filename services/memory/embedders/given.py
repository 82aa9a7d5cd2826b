"""Vectors that callers bring with each text: the service knows their size alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mulligan.memory.embedder import CannotEmbed, EmbedderSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Settings(EmbedderSettings):
    """Vectors that callers bring."""

    size: int = Field(ge=1, le=8192, description="Of each vector.")
    model: str = Field(
        "", max_length=200, description="What makes them. When it changes, entries need new vectors, or a new database."
    )


class GivenVectors:
    def __init__(self, settings: Settings) -> None:
        self.name = f"given/{settings.model}/{settings.size}"
        self.size = settings.size

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import numpy as np

        if texts:
            raise CannotEmbed(f"{self.size} numbers: the server does not make them from the text")
        return np.zeros((0, self.size), np.float32)


def create(settings: Settings) -> GivenVectors:
    return GivenVectors(settings)
