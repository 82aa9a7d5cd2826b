"""Settings of the memory service, and the store that they name."""

from __future__ import annotations

import importlib
from typing import ClassVar

from pydantic import Field

from mulligan.common.config import ServiceSettings
from mulligan.memory.store import Store, StoreError


class MemorySettings(ServiceSettings):
    service: ClassVar[str] = "memory"

    database: str = Field(
        "sqlite:mulligan-memory.db",
        min_length=1,
        description="KIND:LOCATION. The kind is a file in services/memory/stores; a location alone is a SQLite file.",
    )

    async def open_store(self) -> Store:
        """Raises StoreError that names the setting."""
        kind, colon, location = self.database.partition(":")
        if not colon:
            kind = "sqlite"
            location = self.database
        if not kind.isidentifier() or not location:
            raise StoreError(f"database: expected KIND:LOCATION, not {self.database!r}")
        try:
            module = importlib.import_module(f"mulligan.memory.stores.{kind}")
        except ImportError as error:
            raise StoreError(f"database: no store {kind!r}: {error}") from error
        store: Store = await module.open_store(location)
        return store
