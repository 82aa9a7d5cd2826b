"""The embedded model: small enough for two CPU cores, trained from nothing by `mulligan.models.recipe`."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"
