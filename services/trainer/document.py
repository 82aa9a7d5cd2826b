"""A document of the memory that a run rewrites, as DRAFT rewrites the documentation of a tool after trying it (arXiv
2410.08197): what a reflection says stands in the place of the old text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from mulligan.common.errors import DomainError, Reason
from mulligan.common.experience import Experience
from mulligan.common.reflections import (
    Labels,
    MixPart,
    Provenance,
    ReflectionKind,
    ReflectionQuery,
    RetrievalStrategy,
    StoredReflection,
)
from mulligan.trainer.interfaces import MemoryPort
from mulligan.trainer.member import Lesson

_TRIES = 64  # rounds, each lost to a faster writer or to a document that is gone
_TAGS = 32  # of an entry: the limit of the contract
# The latest that is retrieved. Else the one that is in quarantine or on probation: a new text gives it another chance.
_FIND = (MixPart(RetrievalStrategy.BY_KEY, 1), MixPart(RetrievalStrategy.EXPLORE, 1))
# Another writer was faster, or the document was deleted or erased in between.
_CHANGED = (Reason.REVISION_CONFLICT, Reason.UNKNOWN_REFLECTION)


@dataclass(frozen=True)
class RewrittenDocument:
    """The document of this key. Each environment of the scope has its own.

    A tag of the document, "run:RUN@STEP", says which step of a run rewrote it last. It is written together with the
    text. So a step that is repeated after a crash knows that its text was written, even if others rewrote it since.
    """

    memory: MemoryPort
    scope: str
    key: str
    run_id: str

    async def rewrite(self, request_id: str, text: str, provenance: Provenance, step: int) -> None:
        """Makes the text the document's, if it is another one: in a new revision, or in a new document if there is
        none, as it may have been deleted, erased or retired. Whoever else rewrites it meanwhile has a revision of their
        own. A repeated call of a step changes nothing. Raises REVISION_CONFLICT if others were faster all the time."""
        dead = 0
        for _ in range(_TRIES):
            found = await self._find(provenance.environment)
            if found is not None and (found.text == text or self._wrote(found, step)):
                return
            if found is None:
                # Who adds first has the id; the others read it in their next round. If there is nothing to read then,
                # the document of this number is dead.
                labels = Labels(ReflectionKind.DOCUMENT, self.key, (self._tag(step),))
                await self._add(self._birth(provenance.environment, dead), text, provenance, labels)
                dead += 1
            elif await self._revise(found, request_id, text, step):
                return
        message = f"others rewrote the document {self.key!r} of scope {self.scope!r} {_TRIES} times in between"
        raise DomainError(Reason.REVISION_CONFLICT, message)

    async def _find(self, environment: str) -> StoredReflection | None:
        """Its newest revision."""
        kinds = (ReflectionKind.DOCUMENT,)
        strategy = RetrievalStrategy.MIX
        query = ReflectionQuery(self.scope, environment, strategy, len(_FIND), kinds=kinds, key=self.key, mix=_FIND)
        return next(iter((await self.memory.query(query)).reflections), None)

    async def _add(self, request_id: str, text: str, provenance: Provenance, labels: Labels) -> None:
        try:
            await self.memory.add(request_id, self.scope, text, provenance, labels)
        except DomainError as error:
            if error.reason is not Reason.REQUEST_CONFLICT:
                raise

    async def _revise(self, found: StoredReflection, request_id: str, text: str, step: int) -> bool:
        """Whether it was still at this revision."""
        try:
            await self.memory.revise(
                found.reflection_id, request_id, found.revision, text=text, tags=self._tags(found, step)
            )
        except DomainError as error:
            if error.reason not in _CHANGED:
                raise
            return False
        return True

    def _birth(self, environment: str, number: int) -> str:
        """The request id of the document of this number: the same for all runs, so that two never add one each."""
        parts = json.dumps([environment, self.key, number])
        return f"document-{hashlib.sha256(parts.encode()).hexdigest()[:32]}"

    def _wrote(self, found: StoredReflection, step: int) -> bool:
        """Whether this step of the run, or a later one, rewrote it."""
        steps = [tag.removeprefix(self._own) for tag in found.tags if tag.startswith(self._own)]
        return any(one.isdecimal() and int(one) >= step for one in steps)

    def _tags(self, found: StoredReflection, step: int) -> tuple[str, ...]:
        """Those of others stay; of runs' the oldest give way where there are too many."""
        others = [tag for tag in found.tags if not tag.startswith(self._own)]
        spare = [tag for tag in others if tag.startswith("run:")][: max(0, len(others) - _TAGS + 1)]
        return (*(tag for tag in others if tag not in spare), self._tag(step))[:_TAGS]

    def _tag(self, step: int) -> str:
        return f"{self._own}{step}"

    @property
    def _own(self) -> str:
        return f"run:{self.run_id}@"


def best_of(lessons: Iterable[tuple[Experience, Lesson]]) -> list[tuple[Experience, Lesson]]:
    """Of each environment the one with the best reward after it; among equals the latest, as with successes.

    One of a step, not all in a row: their writers read the same revision, so each would throw away what the one before
    wrote, unread and untried.
    """
    best: dict[str, tuple[Experience, Lesson]] = {}
    for experience, lesson in lessons:
        known = best.get(experience.environment)
        if known is None or lesson.reward_after >= known[1].reward_after:
            best[experience.environment] = (experience, lesson)
    return list(best.values())
