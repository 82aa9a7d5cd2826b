"""What an entry of the memory says: as somebody asked for it, as it was read, and as it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mulligan.common.reflections import Provenance, ReflectionKind, StoredReflection

_KINDS = dict(enumerate((ReflectionKind.RULE, *ReflectionKind)))  # as the contract numbers them
_NOTHING = Provenance("", "", "", "", 0, 0.0, 0.0, success=False)


@dataclass(frozen=True, slots=True)
class EntryContent:
    """Text, key and tags can be rewritten, and are lost where an entry is erased. The others last."""

    scope: str
    provenance: Provenance
    kind: ReflectionKind
    source_ids: tuple[str, ...]
    text: str
    key: str
    tags: tuple[str, ...]

    @classmethod
    def recorded(cls, message: Mapping[str, Any]) -> EntryContent:
        """Of a request to add it, or of an entry in an answer: their fields have the same names."""
        return cls(
            message.get("scope", ""),
            replace(_NOTHING, **message.get("provenance", {})),
            _KINDS[message.get("kind", 0)],
            tuple(sorted(message.get("source_ids", ()))),
            message.get("text", ""),
            message.get("key", ""),
            tuple(sorted(message.get("tags", ()))),
        )

    @classmethod
    def stored(cls, entry: StoredReflection) -> EntryContent:
        sources, tags = tuple(sorted(entry.source_ids)), tuple(sorted(entry.tags))
        return cls(entry.scope, entry.provenance, entry.kind, sources, entry.text, entry.key, tags)

    @property
    def lasting(self) -> EntryContent:
        return replace(self, text="", key="", tags=())


def is_as_written(entry: StoredReflection) -> bool:
    """Whether nothing of it was rewritten or erased."""
    return entry.revision == 1 and entry.erased_version is None


def comparable(content: EntryContent, entry: StoredReflection) -> EntryContent:
    """The part of the content that the stored entry must still have."""
    return content if is_as_written(entry) else content.lasting


def differences(entry: StoredReflection, content: EntryContent) -> str:
    """What the stored entry has other than this content, for people; empty if nothing."""
    wanted, found = comparable(content, entry), comparable(EntryContent.stored(entry), entry)
    told = [
        f"{field.name} {getattr(found, field.name)!r}, not {getattr(wanted, field.name)!r}"
        for field in fields(EntryContent)
        if getattr(found, field.name) != getattr(wanted, field.name)
    ]
    return "; ".join(told)
