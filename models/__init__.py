"""The model that comes with the code: small enough for two CPU cores, trained by `models.recipe` from nothing."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"
