"""Where the files of a model are."""

from __future__ import annotations

from mulligan import models


def source_of(model: str) -> str:
    """Folder or hub id of what the setting `model` names."""
    return str(models.EMBEDDED) if model == "embedded" else model
