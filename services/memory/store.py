"""What a memory store does. A new store is a module that exports `Settings` and `open`.

Every write makes a new version of its scope, counted from 1. A read sees exactly the entries of one version. The
versions of different scopes are independent of each other.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Protocol

from mulligan.common.plugins import PluginSettings
from mulligan.common.types import Provenance, RetrievalStrategy, StoredReflection


class StoreSettings(PluginSettings):
    """Base of the `Settings` that a store exports."""


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
    """A write is durable when its call returns. For mistakes of the caller, methods raise DomainError and nothing
    else."""

    async def add(self, request_id: str, scope: str, text: str, provenance: Provenance) -> Added:
        """Stores once per (scope, request_id): a repeated call returns the first answer. Raises REQUEST_CONFLICT if the
        reflection differs from that of the first call."""

    async def query(
        self, scope: str, environment: str, strategy: RetrievalStrategy, limit: int, as_of_version: int | None
    ) -> Found:
        """Successful reflections of the environment, best first. Raises UNKNOWN_VERSION if the scope has no
        such version yet."""

    async def get(self, reflection_id: str) -> StoredReflection:
        """Also returns deleted reflections. Raises UNKNOWN_REFLECTION."""

    async def list(self, scope: str, position: int, limit: int, include_deleted: bool) -> Page:
        """In the order of adding, after `position` (0: from the start). An empty scope means all scopes."""

    async def delete(self, reflection_id: str) -> int:
        """Returns the version from which it is deleted; the same one if repeated. Raises UNKNOWN_REFLECTION."""

    async def snapshot(self, scope: str) -> Snapshot:
        """The scope's newest version and the number of its reflections; version 0 for a scope without writes."""

    async def close(self) -> None: ...


def reflection_id(scope: str, request_id: str) -> str:
    """The id of a reflection. It is the same in every store and after a restart, so a retry cannot store it twice."""
    return hashlib.sha256(json.dumps([scope, request_id]).encode()).hexdigest()[:32]
