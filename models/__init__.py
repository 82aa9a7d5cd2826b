"""The model that comes with the code: small enough for two CPU cores, made by `mulligan.models.recipe` from nothing."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"
