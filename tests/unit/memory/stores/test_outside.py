"""A store from a package outside of this repository passes what every store passes."""

from __future__ import annotations

import pytest

from mulligan.memory.store import Store
from tests.support.distribution.acme import notes
from tests.support.stores import Open, StoreChecks


class TestNotes(StoreChecks):
    @pytest.fixture
    def open_store(self) -> Open:
        """The notes of one process: they lie there when they are opened again."""
        desk = notes.Notes(notes.Settings())

        async def opened() -> Store:
            return desk

        return opened
