"""The learners of a server: their owners and leases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.settings import LearnerSpec

log = structlog.get_logger()
UNANSWERED_SECONDS = 60.0  # the lease of a learner whose CreateLearner was given up, unless it is called again
_TICK_SECONDS = 0.2


class ProcessClock:
    """Counts the seconds in which this process ran. After a stop (SIGSTOP, a laptop that sleeps) the leases have not
    run out before their owners could call."""

    def __init__(self) -> None:
        self.now = 0.0

    async def tick(self) -> None:
        before = time.monotonic()
        await asyncio.sleep(_TICK_SECONDS)
        self.now += min(time.monotonic() - before, 2 * _TICK_SECONDS)


@dataclass
class HeldLearner:
    """A learner with its owner, its last numbered call, and its lease in seconds (None: no lease)."""

    learner: Learner
    owner: str
    spec: LearnerSpec
    clock: ProcessClock
    lease: float | None
    last_call: float  # time of its end
    next_call: int = 1  # the `sequence` of the contract
    last_request: bytes = b""  # digest of the last numbered call
    last_answer: dict[str, float] | None = None  # to that call
    compute_seconds: float = 0.0
    calls: int = 0  # running or waiting

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context manager around an owner's call. It renews the lease at its end."""
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1
            self.renew()

    def renew(self) -> None:
        self.last_call = self.clock.now

    @property
    def idle(self) -> float:
        """Seconds since the last call; 0 during one."""
        return 0.0 if self.calls else self.clock.now - self.last_call

    @property
    def is_over(self) -> bool:
        return self.lease is not None and self.idle > self.lease

    def __str__(self) -> str:
        lease = "no lease" if self.lease is None else f"a lease of {self.lease:g} s"
        return f"{self.learner.learner_id!r} of {self.owner!r}, idle for {self.idle:.0f} s, with {lease}"


class HeldLearners:
    """The learners by id. `owned` finds one for its owner; `check_room` deletes those whose lease is over.

    Learners are added, removed and changed on the worker thread; `HeldLearner.in_use` and `clock` are used on the event
    loop. `on_removed` gets the id of each learner that is removed.
    """

    def __init__(self, limit: int, on_removed: Callable[[str], None]) -> None:
        self.clock = ProcessClock()
        self._limit = limit
        self._on_removed = on_removed
        self._held: dict[str, HeldLearner] = {}

    def __iter__(self) -> Iterator[HeldLearner]:
        return iter(sorted(self._held.values(), key=lambda held: held.learner.learner_id))

    def get(self, learner_id: str) -> HeldLearner | None:
        return self._held.get(learner_id)

    def add(self, held: HeldLearner) -> None:
        self._held[held.learner.learner_id] = held

    def remove(self, learner_id: str) -> None:
        if self._held.pop(learner_id, None) is not None:
            self._on_removed(learner_id)

    def clear(self) -> None:
        self._held.clear()

    def remove_what_is_over(self) -> None:
        for held in [held for held in self._held.values() if held.is_over]:
            log.warning("lease over, learner deleted", learner_id=held.learner.learner_id, owner=held.owner)
            self.remove(held.learner.learner_id)

    def check_room(self) -> None:
        """Raises DomainError CAPACITY_REACHED."""
        self.remove_what_is_over()
        if len(self._held) < self._limit:
            return
        first = max(self, key=lambda held: held.idle)
        raise DomainError(
            Reason.CAPACITY_REACHED,
            f"this server holds {len(self._held)} of at most {self._limit} learners: "
            f"{'; '.join(map(str, self))}. To free one: mulligan learners delete {first.learner.learner_id}",
            learner_id=first.learner.learner_id,
            owner=first.owner,
        )

    def find(self, learner_id: str) -> HeldLearner:
        """Raises DomainError UNKNOWN_LEARNER."""
        held = self._held.get(learner_id)
        if held is None:
            raise DomainError(
                Reason.UNKNOWN_LEARNER,
                f"there is no learner {learner_id!r}: create it, and load its checkpoint",
                learner_id=learner_id,
            )
        return held

    def owned(self, learner_id: str, owner: str) -> HeldLearner:
        """Raises DomainError UNKNOWN_LEARNER and LEARNER_OWNED."""
        held = self.find(learner_id)
        if held.owner != owner:
            raise DomainError(
                Reason.LEARNER_OWNED, f"learner {learner_id!r} belongs to {held.owner!r}", owner=held.owner
            )
        return held
