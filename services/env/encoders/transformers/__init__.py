"""Text encoders from the Hugging Face hub or a folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mulligan.common.extras import MissingExtra

if TYPE_CHECKING:
    from mulligan.env.search import TextEncoder


@dataclass(frozen=True, slots=True)
class Settings:
    """`model` is a hub id or a folder, and `revision` a commit, a tag or a branch of a hub id. `pooling`: the mean over
    tokens, or the first token's state ("cls")."""

    model: str = "intfloat/e5-base-v2"
    revision: str = ""
    pooling: str = "mean"
    query_prefix: str = "query: "
    passage_prefix: str = "passage: "
    max_tokens: int = 512
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f'pooling must be "mean" or "cls", not {self.pooling!r}')
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")


def create(settings: Settings) -> TextEncoder:
    """Loads the encoder. Raises ValueError, which names the setting, and MissingExtra."""
    try:
        from mulligan.env.encoders.transformers.encoder import TransformersEncoder
    except ModuleNotFoundError as error:
        raise MissingExtra("hotpotqa-dense", error) from error
    return TransformersEncoder(settings)
