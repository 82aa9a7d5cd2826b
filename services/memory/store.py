"""What a memory store does, whatever it is made of. A new store is a module that exports `Settings` and `open`.

Every write makes a new version of its scope, counted from 1. A read sees exactly the entries of one version. The
versions of different scopes are independent of each other.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Protocol

from mulligan.common.types import Provenance, RetrievalStrategy, StoredReflection


class StoreError(Exception):
    """The store cannot be opened; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Added:
    reflection_id: str
    version: int  # of the scope, made by this write


@dataclass(frozen=True, slots=True)
class Snapshot:
    version: int
    reflection_count: int


@dataclass(frozen=True, slots=True)
class Found:
    reflections: tuple[StoredReflection, ...]
    version: int  # that was read


@dataclass(frozen=True, slots=True)
class Page:
    reflections: tuple[StoredReflection, ...]
    next_position: int | None  # None on the last page


class Store(Protocol):
    """A write is durable when its call returns. Every method raises DomainError alone for what a caller did wrong."""

    async def add(self, request_id: str, scope: str, text: str, provenance: Provenance) -> Added:
        """Exactly once on (scope, request_id): a repeated call returns the first answer. REQUEST_CONFLICT when the
        reflection differs from the first call's."""

    async def query(
        self, scope: str, environment: str, strategy: RetrievalStrategy, limit: int, as_of_version: int | None
    ) -> Found:
        """Successful reflections of the environment, best first. UNKNOWN_VERSION when the version is not reached."""

    async def get(self, reflection_id: str) -> StoredReflection:
        """Deleted ones, too. UNKNOWN_REFLECTION."""

    async def list(self, scope: str, position: int, limit: int, include_deleted: bool) -> Page:
        """In the order in which they were added, after `position` (0: from the start); all scopes when it is empty."""

    async def delete(self, reflection_id: str) -> int:
        """The version from which it is forgotten; the same again when repeated. UNKNOWN_REFLECTION."""

    async def snapshot(self, scope: str) -> Snapshot:
        """Version 0 for a scope without writes."""

    async def close(self) -> None: ...


def reflection_id(scope: str, request_id: str) -> str:
    """The same in every store and after every restart, so that a retry cannot make a second one."""
    return hashlib.sha256(json.dumps([scope, request_id]).encode()).hexdigest()[:32]
