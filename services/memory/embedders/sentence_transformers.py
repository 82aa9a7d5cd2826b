"""Any model of Sentence Transformers, by its name on the hub or its folder. https://sbert.net"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mulligan.common.extras import MissingExtra
from mulligan.common.files import file_sha256
from mulligan.memory.embedder import EmbedderSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Settings(EmbedderSettings):
    """A model of Sentence Transformers."""

    model: str = Field(min_length=1, description="Its name on the hub, or its folder.")
    revision: str = Field("", description="Of a model on the hub: a commit, a tag or a branch.")
    device: str = Field("cpu", min_length=1, description="Such as cuda:0.")
    batch_size: int = Field(32, ge=1, description="Texts at once.")


class SentenceTransformersEmbedder:
    def __init__(self, settings: Settings) -> None:
        from sentence_transformers import SentenceTransformer

        self._settings = settings
        self._model: Any = SentenceTransformer(
            settings.model,
            device=settings.device,
            revision=settings.revision or None,
            model_kwargs={"use_safetensors": True},  # a pickle can run code
        )
        self.name = _name(settings)
        self.size = len(self._model.encode(["a"], show_progress_bar=False)[0])

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import numpy as np

        if not texts:
            return np.zeros((0, self.size), np.float32)
        found = self._model.encode(
            list(texts),
            batch_size=self._settings.batch_size,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=True,
        )
        return np.asarray(found, np.float32)


def create(settings: Settings) -> SentenceTransformersEmbedder:
    """Raises MissingExtra, and OSError for a model that is not there."""
    try:
        return SentenceTransformersEmbedder(settings)
    except ModuleNotFoundError as error:
        raise MissingExtra("memory-sentence-transformers", error) from error


def _name(settings: Settings) -> str:
    """With the content of a folder, so that other weights at the same place are another model."""
    folder = Path(settings.model)
    if not folder.is_dir():
        return f"sentence_transformers/{settings.model}/{settings.revision}"
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder)} {file_sha256(file)}\n".encode())
    return f"sentence_transformers/{digest.hexdigest()}"
