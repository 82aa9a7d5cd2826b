"""Entries of the reflection memory, and the evidence about them, as services share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

MAX_TEXT_BYTES = 2**20  # of an entry, and of a query, in UTF-8: the limit of the contract


class RetrievalStrategy(StrEnum):
    """How to choose among the entries of an environment: `services/memory/retrieval/` has a file for each.

    LATEST_SUCCESS and TOP_GAIN see only entries that report a success, as their writers claim it. The others see all.
    """

    LATEST_SUCCESS = "latest_success"  # as in the paper
    TOP_GAIN = "top_gain"  # largest reward_after - reward_before; ties: the latest
    BEST_UPLIFT = "best_uplift"  # greatest lower bound of the measured uplift; ties: the latest
    SIMILAR_WORDS = "similar_words"  # to a text, by the words that they share (BM25)
    SIMILAR_MEANING = "similar_meaning"  # to a text, by the cosine of their embeddings
    EXPLORE = "explore"  # used least often; ties: the latest
    BY_KEY = "by_key"  # all entries of a key, the latest first
    MIX = "mix"  # some of several strategies, without near-duplicates


class ReflectionKind(StrEnum):
    """RULE: advice, such as a reflection. EPISODE: what happened, word for word; its text is never rewritten. DOCUMENT:
    a text that is meant to be rewritten."""

    RULE = "rule"
    EPISODE = "episode"
    DOCUMENT = "document"


class ReflectionStatus(StrEnum):
    """CANDIDATE: no proof yet. PROBATION: the same, and it was made from other entries, or was quarantined before;
    EXPLORE alone retrieves it. ACTIVE: proved to help. QUARANTINED: proved to harm, not retrieved. RETIRED: not
    retrieved, by somebody's choice."""

    CANDIDATE = "candidate"
    ACTIVE = "active"
    QUARANTINED = "quarantined"
    RETIRED = "retired"
    PROBATION = "probation"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Origin of a reflection, and the rewards before and after it."""

    run_id: str
    experience_id: str
    environment: str
    task_id: str
    policy_version: int
    reward_before: float
    reward_after: float
    success: bool


@dataclass(frozen=True, slots=True)
class Uplift:
    """What the uses of an entry say: the mean reward with it less the mean reward without it.

    `lower` and `upper` are an interval that holds at all times (`services/memory/evidence.py`). `uplift` is None until
    there was a use of both sorts. Rewards are from 0 to 1.
    """

    uses_shown: int
    uses_left_out: int
    mean_shown: float
    mean_left_out: float
    uplift: float | None
    lower: float
    upper: float


@dataclass(frozen=True, slots=True)
class StoredReflection:
    """An entry of the memory, as it was at a version of its scope.

    `version` is the version of the scope that its first write made, `deleted_version` the version from which it is
    deleted. `revision` counts the rewritings of what can be rewritten (text, key, tags, status), from 1. `uplift` is of
    this revision's text; None while no use has been reported. An erased entry has lost its text.
    """

    reflection_id: str
    scope: str
    text: str
    provenance: Provenance
    version: int
    created_at: datetime
    deleted_version: int | None = None
    kind: ReflectionKind = ReflectionKind.RULE
    key: str = ""
    tags: tuple[str, ...] = ()
    source_ids: tuple[str, ...] = ()  # entries that it was made from
    status: ReflectionStatus = ReflectionStatus.CANDIDATE
    revision: int = 1
    uplift: Uplift | None = None
    erased_version: int | None = None


@dataclass(frozen=True, slots=True)
class Labels:
    """What a writer says of an entry beside its text and origin."""

    kind: ReflectionKind = ReflectionKind.RULE
    key: str = ""
    tags: tuple[str, ...] = ()
    source_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MixPart:
    """At most `limit` entries of one strategy."""

    strategy: RetrievalStrategy
    limit: int


@dataclass(frozen=True, slots=True)
class ReflectionQuery:
    """Which entries of a scope to retrieve.

    `version` None means the newest. `text` and `embedding` are what SIMILAR_WORDS and SIMILAR_MEANING compare with;
    without an embedding the service computes that of `text`. `key`, `tags` (all of them), `kinds` (any of them) and
    `task_prefix`, the beginning of the task's id, leave out what does not fit. `max_tokens` limits the sum of the
    texts' lengths, a token being four bytes of UTF-8; 0 means no limit.
    """

    scope: str
    environment: str
    strategy: RetrievalStrategy
    limit: int = 1
    version: int | None = None
    text: str = ""
    embedding: tuple[float, ...] = ()
    kinds: tuple[ReflectionKind, ...] = ()
    key: str = ""
    tags: tuple[str, ...] = ()
    task_prefix: str = ""
    max_tokens: int = 0
    mix: tuple[MixPart, ...] = ()


@dataclass(frozen=True, slots=True)
class Addition:
    """A reflection to add. A repeated request id changes nothing. With `unless_known` nothing is stored if an entry of
    the scope has this environment, kind and text."""

    request_id: str
    scope: str
    text: str
    provenance: Provenance
    labels: Labels = Labels()
    unless_known: bool = False


@dataclass(frozen=True, slots=True)
class Trial:
    """Asks for uses of what a query retrieves, one for each of `use_keys`, which are unique in the scope.

    With probability `holdout` a use leaves out one of the entries. Which use leaves out what follows from `seed`, the
    use's key and the entries' ids.
    """

    use_keys: tuple[str, ...]
    holdout: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Use:
    """One use of retrieved entries. All are shown but `left_out_id`, which is empty if none was left out."""

    use_id: str
    use_key: str
    left_out_id: str = ""


@dataclass(frozen=True, slots=True)
class Retrieved:
    """Entries, the best first, as they were at `version`; a use for each key of a trial, none without entries."""

    reflections: tuple[StoredReflection, ...]
    version: int
    uses: tuple[Use, ...] = ()


@dataclass(frozen=True, slots=True)
class UseOutcome:
    """The reward of the attempt that a use was for, from 0 to 1."""

    use_id: str
    reward: float


@dataclass(frozen=True, slots=True)
class RecordedUse:
    """A use of one entry. `reward` is None until it is reported."""

    use_id: str
    use_key: str
    shown: bool
    revision: int  # of the entry
    holdout: float  # probability with which the entry was left out
    reward: float | None
    drawn_at: datetime


@dataclass(frozen=True, slots=True)
class Explained:
    """Why an entry has its status: its latest uses, what it was made from (parents before grandparents), and the ids of
    what was made from it."""

    reflection: StoredReflection
    uses: Sequence[RecordedUse]
    sources: Sequence[StoredReflection]
    derived_ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class MemoryChange:
    """A write: who changed what. `version` is the version of the scope that it made."""

    scope: str
    version: int
    action: str  # add, revise, delete, erase, report, quarantine, activate, recover
    reflection_id: str  # empty for a report
    actor: str
    changed_at: datetime
    detail: str = ""
