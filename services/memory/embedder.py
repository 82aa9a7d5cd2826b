"""What an embedder does. A new one is a module that exports `Settings` and `create`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from mulligan.common.plugins import PluginSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class EmbedderSettings(PluginSettings):
    """Base of the `Settings` that an embedder exports."""


class CannotEmbed(Exception):
    """The embedder makes no vectors itself: callers bring them. The message says what they have to bring."""


class Embedder(Protocol):
    """Turns texts into unit vectors. `embed` is called from several threads."""

    @property
    def name(self) -> str:
        """Changes whenever the vectors change: the model and its version."""

    @property
    def size(self) -> int:
        """Of each vector."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, size); each row has length 1, or is zero where the text has nothing to embed. Raises CannotEmbed if
        there is a text, and callers have to bring embeddings."""
