"""A store that keeps reflections in memory, and loses them with its process."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from pydantic import Field

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import Provenance, RetrievalStrategy, StoredReflection
from mulligan.memory import Added, Found, Page, Snapshot, StoreError, StoreSettings, reflection_id


class Settings(StoreSettings):
    """A notebook."""

    pages: int = Field(1_000_000, ge=1, description="Reflections that it has room for.")


class Notes:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kept: dict[str, StoredReflection] = {}  # by id, in the order in which they were added
        self._versions: dict[str, int] = {}

    async def add(self, request_id: str, scope: str, text: str, provenance: Provenance) -> Added:
        identity = reflection_id(scope, request_id)
        if known := self._kept.get(identity):
            if (known.text, known.provenance) != (text, provenance):
                raise DomainError(Reason.REQUEST_CONFLICT, f"request {request_id!r} stored another reflection")
            return Added(identity, known.version)
        if len(self._kept) >= self._settings.pages:
            raise DomainError(Reason.DISK_FULL, f"all {self._settings.pages} pages are full")
        version = self._write(scope)
        self._kept[identity] = StoredReflection(identity, scope, text, provenance, version, datetime.now(UTC))
        return Added(identity, version)

    async def query(
        self, scope: str, environment: str, strategy: RetrievalStrategy, limit: int, as_of_version: int | None
    ) -> Found:
        newest = self._versions.get(scope, 0)
        version = newest if as_of_version is None else as_of_version
        if version > newest:
            raise DomainError(Reason.UNKNOWN_VERSION, f"{scope!r} is at version {newest}", version=newest)
        found = [
            kept
            for kept in self._kept.values()
            if kept.scope == scope and kept.provenance.environment == environment and kept.provenance.success
            if kept.version <= version and (kept.deleted_version is None or kept.deleted_version > version)
        ]
        found.sort(key=lambda kept: (_gain(kept, strategy), kept.version), reverse=True)
        return Found(tuple(found[:limit]), version)

    async def get(self, reflection_id: str) -> StoredReflection:
        if reflection_id not in self._kept:
            raise DomainError(Reason.UNKNOWN_REFLECTION, f"no reflection {reflection_id!r} here")
        return self._kept[reflection_id]

    async def list(self, scope: str, position: int, limit: int, include_deleted: bool) -> Page:
        listed = [
            (place, kept)
            for place, kept in enumerate(self._kept.values(), 1)
            if place > position and scope in ("", kept.scope) and (include_deleted or kept.deleted_version is None)
        ]
        page = listed[:limit]
        return Page(tuple(kept for _, kept in page), page[-1][0] if len(listed) > limit else None)

    async def delete(self, reflection_id: str) -> int:
        kept = await self.get(reflection_id)
        if kept.deleted_version is not None:
            return kept.deleted_version
        version = self._write(kept.scope)
        self._kept[reflection_id] = replace(kept, deleted_version=version)
        return version

    async def snapshot(self, scope: str) -> Snapshot:
        kept = [kept for kept in self._kept.values() if kept.scope == scope and kept.deleted_version is None]
        return Snapshot(self._versions.get(scope, 0), len(kept))

    async def close(self) -> None:
        return None

    def _write(self, scope: str) -> int:
        self._versions[scope] = self._versions.get(scope, 0) + 1
        return self._versions[scope]


async def open(location: str, settings: Settings) -> Notes:
    if location != "desk":
        raise StoreError(f"database: notes lie on the desk, not at {location!r}")
    return Notes(settings)


def _gain(kept: StoredReflection, strategy: RetrievalStrategy) -> float:
    origin = kept.provenance
    return origin.reward_after - origin.reward_before if strategy is RetrievalStrategy.TOP_GAIN else 0.0
