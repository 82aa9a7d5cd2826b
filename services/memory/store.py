"""What a memory store does. A new store is a module that exports `Settings` and `open`.

Every write makes a new version of its scope, counted from 1. A read sees exactly the entries of one version, with the
status and the evidence that they had then. The versions of different scopes are independent of each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mulligan.common.errors import DomainError
from mulligan.common.plugins import PluginSettings
from mulligan.common.reflections import (
    Labels,
    MemoryChange,
    Provenance,
    RecordedUse,
    ReflectionKind,
    ReflectionStatus,
    StoredReflection,
    Uplift,
    UseOutcome,
)

if TYPE_CHECKING:
    from mulligan.memory.embedder import Embedder
    from mulligan.memory.evidence import Evidence


class StoreSettings(PluginSettings):
    """Base of the `Settings` that a store exports."""


class StoreError(Exception):
    """The store cannot be opened; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class NewReflection:
    """An entry to add. `embedding` is a unit vector, of the same length in all entries; empty without an embedder. With
    `unless_known` no entry is added if one of the scope has the same environment, kind and text already."""

    request_id: str
    scope: str
    text: str
    provenance: Provenance
    labels: Labels = Labels()
    embedding: Sequence[float] = ()
    actor: str = ""
    unless_known: bool = False


@dataclass(frozen=True, slots=True)
class Rewriting:
    """What a revision changes: None stays as it is. `embedding` is that of the new text."""

    reflection_id: str
    request_id: str
    expected_revision: int
    text: str | None = None
    key: str | None = None
    tags: tuple[str, ...] | None = None
    status: ReflectionStatus | None = None
    embedding: Sequence[float] = ()
    actor: str = ""


@dataclass(frozen=True, slots=True)
class Added:
    reflection_id: str
    version: int  # of the scope, made by this write, or by that of the entry that was known


@dataclass(frozen=True, slots=True)
class Revised:
    revision: int
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


@dataclass(frozen=True, slots=True)
class ChangePage:
    changes: tuple[MemoryChange, ...]
    next_position: int | None  # None on the last page


class Order(StrEnum):
    """Among equals the latest comes first, by the version of the first write; with UPLIFT by that of the last write of
    the text, which may have been known."""

    NEWEST = "newest"
    GAIN = "gain"  # greatest reward_after - reward_before
    UPLIFT = "uplift"  # greatest lower bound of the uplift; -1 without uses
    FEWEST_USES = "fewest_uses"  # those in its evidence; each counts eight times where the entry is quarantined


ANSWER_BYTES = 32 * 2**20  # of texts in one answer: half of the largest message
RETRIEVED = frozenset({ReflectionStatus.CANDIDATE, ReflectionStatus.ACTIVE})


@dataclass(frozen=True, slots=True)
class Selection:
    """Entries of a scope at a version (None: the newest) that are neither deleted nor erased. `kinds`: any of them,
    empty means all. `key` and `tags`: as ReflectionQuery has them."""

    scope: str
    environment: str
    version: int | None = None
    successes_only: bool = False
    statuses: frozenset[ReflectionStatus] = RETRIEVED
    kinds: tuple[ReflectionKind, ...] = ()
    key: str = ""
    tags: tuple[str, ...] = ()
    task_prefix: str = ""


@dataclass(frozen=True, slots=True)
class DrawnUse:
    """A use, and what it is of: the entries that a query retrieved, with their revisions. `holdout` is the probability
    with which each single entry was left out."""

    use_id: str
    use_key: str
    scope: str
    entries: tuple[tuple[str, int], ...] = field(hash=False)
    left_out_id: str
    holdout: float


class Store(Protocol):
    """A write is durable when its call returns. For mistakes of the caller, methods raise DomainError and nothing
    else. `tests/support/stores.py` has the checks that every store passes."""

    async def add(self, new: NewReflection) -> Added:
        """Stores once per (scope, request_id): a repeated call returns the first answer. Raises REQUEST_CONFLICT if
        text, provenance or labels differ from those of the first call (an erased entry has none to compare), and
        UNKNOWN_REFLECTION for a source that is not in the scope.

        With `unless_known` the answer is the oldest entry of the scope that has this environment, kind and text in its
        newest revision, whatever its status, and is neither deleted nor erased. Then the answer is stored, in a version
        in which this entry was written last. Of such calls at the same time one stores its entry."""

    async def find(self, selection: Selection, order: Order, limit: int) -> Found:
        """The first entries in this order. Raises UNKNOWN_VERSION if the scope has no such version yet, and
        SNAPSHOT_REDACTED if an entry that it had at that version was erased; metadata `version`: the next one that can
        be read."""

    async def find_words(self, selection: Selection, text: str, limit: int) -> Found:
        """The entries that share words with the text, by BM25. Of a long text the rarest words decide. Raises as `find`
        does."""

    async def find_nearest(self, selection: Selection, embedding: Sequence[float], limit: int) -> Found:
        """The entries whose embeddings have the greatest cosine with this unit vector. Raises as `find` does."""

    async def get(self, reflection_id: str) -> StoredReflection:
        """Also returns deleted and erased entries, these without text. Raises UNKNOWN_REFLECTION."""

    async def list(self, scope: str, position: int, limit: int, include_deleted: bool) -> Page:
        """In the order of adding, after `position` (0: from the start). An empty scope means all scopes. Deleted and
        erased ones only if `include_deleted`. A page ends at `limit` entries, or where the next one's text would not
        fit into ANSWER_BYTES beside the others."""

    async def revise(self, rewriting: Rewriting) -> Revised:
        """A new revision. If the newest one was made by a call with the same request_id, it is the answer, and another
        text, key or other tags are a REQUEST_CONFLICT. A text that
        differs, and the status CANDIDATE, start without evidence; with such a text the entry is CANDIDATE, unless it is
        or becomes RETIRED. Raises UNKNOWN_REFLECTION (also for what is deleted or erased), RAW_ENTRY (the text of an
        episode) and REVISION_CONFLICT, in this order."""

    async def delete(self, reflection_id: str, actor: str = "", expected_revision: int = 0) -> int:
        """Returns the version from which it is deleted; the same one if repeated. Raises UNKNOWN_REFLECTION, and
        REVISION_CONFLICT where the newest revision is not the expected one; 0 expects any."""

    async def erase(self, reflection_id: str, actor: str = "", expected_revision: int = 0) -> int:
        """Returns the version from which it is erased; the same one if repeated. It is deleted as well, unless it was
        before. No file of the store has the texts of its revisions, its key, tags or embedding any more when the call
        returns. Raises as `delete` does."""

    async def record_uses(self, uses: Sequence[DrawnUse]) -> None:
        """Stores the uses. One that is stored already stays as it is. Raises REQUEST_CONFLICT, and stores none, if one
        of them was stored with other entries or another entry left out. Makes no version."""

    async def report(self, outcomes: Sequence[UseOutcome], actor: str = "") -> int:
        """Records rewards, once for each use, and updates the evidence of the entries (`evidence.py`), in this order,
        and at the end the status that follows from it (`status_after`), all in one version for each scope.
        `evidence_in` says which entries of a use get evidence: not one whose evidence started anew in a later revision
        than the use's; deleted and erased ones, too. Returns how many uses counted. Raises UNKNOWN_USE, and records
        none."""

    async def scopes_of_uses(self, use_ids: Sequence[str]) -> Sequence[str]:
        """The scopes of these uses, each once; an unknown use has none."""

    async def uses_of(self, reflection_id: str, limit: int) -> Sequence[RecordedUse]:
        """The latest uses of an entry, the latest first. Raises UNKNOWN_REFLECTION."""

    async def derived_from(self, reflection_id: str) -> Sequence[str]:
        """Ids of the entries that have it among their sources, in the order of adding."""

    async def changes(self, scope: str, position: int, limit: int) -> ChangePage:
        """The log of writes, in their order, after `position`. An empty scope means all scopes."""

    async def snapshot(self, scope: str) -> Snapshot:
        """The scope's newest version and the number of its entries that are neither deleted nor erased; version 0 for a
        scope without writes."""

    async def use_embedder(self, embedder: Embedder | None) -> None:
        """Called once, before all other calls. If the entries' embeddings are by another embedder, by its name, all
        texts are embedded anew; with None, embeddings are kept as they are and not used. Raises CannotEmbed, and keeps
        the embeddings, if the embedder makes none itself."""

    async def close(self) -> None: ...


@runtime_checkable
class AddsMany(Protocol):
    """What a store may have besides."""

    async def add_all(self, news: Sequence[NewReflection]) -> Sequence[Added | DomainError]:
        """As `add` for each, in this order, with its answer or its error, but durable all at once."""


async def add_all(store: Store, news: Sequence[NewReflection]) -> Sequence[Added | DomainError]:
    """Adds them in this order. Each has its answer or its error."""
    if isinstance(store, AddsMany):
        return await store.add_all(news)
    found: list[Added | DomainError] = []
    for new in news:
        try:
            found.append(await store.add(new))
        except DomainError as error:
            found.append(error)
    return found


def reflection_id(scope: str, request_id: str) -> str:
    """The id of a reflection. It is the same in every store and after a restart, so a retry cannot store it twice."""
    return _digest(scope, request_id)


def use_id(scope: str, use_key: str) -> str:
    """The id of a use, likewise."""
    return _digest("use", scope, use_key)


def text_digest(environment: str, kind: str, text: str) -> str:
    """Equal for entries that `unless_known` takes for the same, and different for others (SHA-256, cut to 128 bits)."""
    return _digest("text", environment, kind, text)


def request_digest(new: NewReflection) -> str:
    """Equal for calls that store the same entry, likewise."""
    return _digest("request", new.text, astuple(new.provenance), astuple(new.labels))


def uplift_of(evidence: Evidence) -> Uplift | None:
    """What the evidence says; None without uses."""
    if not evidence.uses_shown + evidence.uses_left_out:
        return None
    lower, upper = evidence.interval
    return Uplift(
        uses_shown=evidence.uses_shown,
        uses_left_out=evidence.uses_left_out,
        mean_shown=evidence.mean_shown or 0.0,
        mean_left_out=evidence.mean_left_out or 0.0,
        uplift=evidence.uplift,
        lower=lower,
        upper=upper,
    )


def action_of(after: ReflectionStatus) -> str:
    """How the log of writes calls a change to this status that evidence makes."""
    if after is ReflectionStatus.QUARANTINED:
        return "quarantine"
    return "activate" if after is ReflectionStatus.ACTIVE else "recover"


def evidence_in(use: DrawnUse) -> Iterator[tuple[str, int, bool, float]]:
    """What a use says of its entries: id, revision, whether it was shown, and with what probability it was left out.

    A use in which another entry was left out says nothing of this one: so what is compared is all entries with all but
    this one, whatever the others do. Given that no other is left out, of k entries with probability q each, this one is
    with probability q / (1 - (k - 1) q).
    """
    if use.holdout == 0:
        return
    others = (len(use.entries) - 1) * use.holdout
    for identity, revision in use.entries:
        if use.left_out_id in ("", identity):
            yield identity, revision, not use.left_out_id, use.holdout / (1 - others)


def status_after(status: ReflectionStatus, *, helpful: bool, harmful: bool) -> ReflectionStatus:
    """The status that evidence gives an entry. One that was quarantined returns on probation, or as active."""
    if status is ReflectionStatus.RETIRED:
        return status
    if harmful:
        return ReflectionStatus.QUARANTINED
    if helpful:
        return ReflectionStatus.ACTIVE
    return ReflectionStatus.PROBATION if status is ReflectionStatus.QUARANTINED else status


def first_status(labels: Labels) -> ReflectionStatus:
    """Of a new entry. What was made from other entries must prove itself before it is read in their place."""
    return ReflectionStatus.PROBATION if labels.source_ids else ReflectionStatus.CANDIDATE


def rewritten_status(status: ReflectionStatus) -> ReflectionStatus:
    """Of an entry with this status whose text was rewritten: nothing is proved of the new text."""
    kept = (ReflectionStatus.RETIRED, ReflectionStatus.PROBATION)
    return status if status in kept else ReflectionStatus.CANDIDATE


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
