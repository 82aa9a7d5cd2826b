"""The texts of tokens, by the tokenizer of the model that a run trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import structlog

from mulligan.common.model_files import UnsupportedModel
from mulligan.models import locate

log = structlog.get_logger()
Texts = Callable[[Sequence[int]], list[str]]


def texts_of(source: str) -> Texts | None:
    """What writes the tokens of a model as text, each by itself; None where its tokenizer is not on this machine."""
    try:
        file = Path(locate(source)) / "tokenizer.json"
    except UnsupportedModel:
        return None
    return _texts(file) if file.is_file() else None


@lru_cache(16)
def _texts(file: Path) -> Texts | None:
    try:
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises its own kinds; ids are shown then
        log.warning("texts of tokens are not shown", file=str(file), cause=str(error))
        return None

    @lru_cache(100_000)
    def text(token: int) -> str:
        return str(tokenizer.decode([token], skip_special_tokens=False))

    return lambda tokens: [text(token) for token in tokens]
