"""Settings of the memory service, and the store and embedder that they name."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import Field, JsonValue

from mulligan.common.extras import MissingExtra
from mulligan.common.guarded import GuardedSettings
from mulligan.common.plugins import Plugins, UnusablePlugin, chosen_settings, place_of, with_tables
from mulligan.memory.embedder import Embedder
from mulligan.memory.embedders import EMBEDDERS
from mulligan.memory.store import Store, StoreError
from mulligan.memory.stores import STORES


class BadSettings(ValueError):
    """Settings of a store or an embedder; the message names the setting."""


_KIND = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


@with_tables(EMBEDDERS)
@with_tables(STORES)
class MemorySettings(GuardedSettings):
    """The settings of a store or an embedder stand in a table of its name."""

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
    embedder: str = Field(
        "",
        description=f"For SIMILAR_MEANING: {', '.join(EMBEDDERS.built_in)}, one that is installed, or a module. Empty: "
        "none.",
    )
    embedder_settings: dict[str, JsonValue] = Field(
        {}, description="Of an embedder that has no table of its name, such as any module."
    )

    async def open_store(self) -> Store:
        """Raises StoreError that names the setting."""
        kind, colon, location = self.database.partition(":")
        if not colon:
            kind = STORES.default
            location = self.database
        if not _KIND.fullmatch(kind) or not location:
            raise StoreError(f"database: expected KIND:LOCATION, both not empty; the kind is {kind!r}")
        try:
            plugin = STORES.find(kind)
            store: Store = await plugin.open(location, self._settings_of(STORES, kind, self.store_settings))
        except BadSettings as error:
            raise StoreError(str(error)) from error
        except UnusablePlugin as error:
            raise StoreError(f"database: {error}") from error
        except MissingExtra as error:
            raise StoreError(f"database: the store {kind} {error}") from error
        return store

    def create_embedder(self) -> Embedder | None:
        """Loads the model; None if no embedder is set. Raises BadSettings."""
        if not self.embedder:
            if self.embedder_settings:
                raise BadSettings(f"{EMBEDDERS.others}: no embedder is set")
            return None
        try:
            plugin = EMBEDDERS.find(self.embedder)
            settings = self._settings_of(EMBEDDERS, self.embedder, self.embedder_settings)
            embedder: Embedder = plugin.create(settings)
        except (UnusablePlugin, OSError) as error:
            raise BadSettings(f"embedder: {error}") from error
        except MissingExtra as error:
            raise BadSettings(f"embedder: {self.embedder} {error}") from error
        return embedder

    def _settings_of(self, plugins: Plugins, kind: str, others: dict[str, JsonValue]) -> Any:
        place = place_of(type(self), plugins, kind)
        if others and place != f"{plugins.others}.":
            raise BadSettings(f"{plugins.others}: the settings of {kind} have a place of their own")
        try:
            return chosen_settings(self, plugins, kind)
        except ValueError as error:
            raise BadSettings(f"{place}{error}") from error
