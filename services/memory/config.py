"""Settings of the memory service, and the store that they name."""

from __future__ import annotations

import re
from typing import ClassVar

from pydantic import Field, JsonValue

from mulligan.common.config import ServiceSettings
from mulligan.common.extras import MissingExtra
from mulligan.common.plugins import UnusablePlugin, chosen_settings, place_of, with_tables
from mulligan.memory.store import Store, StoreError, StoreSettings
from mulligan.memory.stores import STORES

_KIND = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


@with_tables(STORES)
class MemorySettings(ServiceSettings):
    """The settings of a store stand in a table of its name."""

    service: ClassVar[str] = "memory"

    database: str = Field(
        f"{STORES.default}:mulligan-memory.db",
        min_length=1,
        description=f"KIND:LOCATION. The kind is a store: {', '.join(STORES.built_in)}, one that is installed, or a "
        f"module. A location alone means {STORES.default}.",
    )
    store_settings: dict[str, JsonValue] = Field(
        {}, description="Of a store that has no table of its name, such as any module."
    )

    async def open_store(self) -> Store:
        """Raises StoreError that names the setting."""
        kind, colon, location = self.database.partition(":")
        if not colon:
            kind = STORES.default
            location = self.database
        if not _KIND.fullmatch(kind) or not location:
            raise StoreError(f"database: expected KIND:LOCATION, not {self.database!r}")
        try:
            plugin = STORES.find(kind)
            store: Store = await plugin.open(location, self._settings_of(kind))
        except UnusablePlugin as error:
            raise StoreError(f"database: {error}") from error
        except MissingExtra as error:
            raise StoreError(f"database: the store {kind} {error}") from error
        return store

    def _settings_of(self, kind: str) -> StoreSettings:
        place = place_of(type(self), STORES, kind)
        if self.store_settings and place != f"{STORES.others}.":
            raise StoreError(f"{STORES.others}: the settings of {kind} have a place of their own")
        try:
            settings: StoreSettings = chosen_settings(self, STORES, kind)
        except ValueError as error:
            raise StoreError(f"{place}{error}") from error
        return settings
