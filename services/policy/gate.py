"""Who may pass while weights change: calls wait for an update, and what unverified weights sampled is not answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import PolicyState, VersionSpan

_RETRY_AFTER = timedelta(seconds=1)


class Gate:
    """In front of one model. `available` tells whether any of its engines serves."""

    def __init__(self, name: str, policy_version: int, available: Callable[[], bool]):
        self._name = name
        self._available = available
        self._phase = PolicyState.UPDATING
        self._changed = asyncio.Event()  # replaced by another with each change
        self.policy_version = policy_version
        self.problem = ""
        self.in_flight = 0
        self.passed: set[int] = set()  # versions whose weights were checked when they were loaded last

    @property
    def phase(self) -> PolicyState:
        """SERVING also when no engine answers."""
        return self._phase

    @property
    def state(self) -> PolicyState:
        if self._phase is PolicyState.SERVING and not self._available():
            return PolicyState.UNAVAILABLE
        return self._phase

    def set(self, phase: PolicyState, problem: str | None = None) -> None:
        """Calls pass (SERVING), wait (UPDATING, RELEASED) or fail (REFUSED) from now on; those that passed go on."""
        self._phase = phase
        if problem is not None:
            self.problem = problem
        self._wake()

    def open(self, policy_version: int, problem: str = "") -> None:
        """This version was checked and serves."""
        self.policy_version = policy_version
        self.passed.add(policy_version)
        self.set(PolicyState.SERVING, problem)

    @asynccontextmanager
    async def serving(self, min_policy_version: int | None = None, version_wait: float = 0.0) -> AsyncIterator[None]:
        """Waits while weights change or memory is released, and at most `version_wait` seconds for the version.

        Raises DomainError POLICY_VERSION_TOO_OLD, POLICY_REFUSED or ENGINE_UNAVAILABLE.
        """
        if self._phase is not PolicyState.SERVING or (min_policy_version or 0) > self.policy_version:
            await self._pass(min_policy_version or 0, version_wait)
        if not self._available():
            raise DomainError(
                Reason.ENGINE_UNAVAILABLE, f"no engine of the policy {self._name} answers", retry_after=_RETRY_AFTER
            )
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self._wake()

    async def verified(self, spans: Sequence[VersionSpan]) -> bool:
        """Waits while a version of these is being checked. False when one was refused, or not loaded after all: the
        caller samples again from the start. Raises DomainError POLICY_REFUSED when there is nothing to sample from."""
        while not (passed := self._all_passed(spans)):
            self.refuse_refused()
            if self._phase is not PolicyState.UPDATING:
                break
            await self._changed.wait()
        return passed

    def refuse_refused(self) -> None:
        """Raises DomainError POLICY_REFUSED where that is the state."""
        if self._phase is PolicyState.REFUSED:
            raise DomainError(Reason.POLICY_REFUSED, f"the policy {self._name} serves nothing: {self.problem}")

    async def drained(self) -> None:
        """Returns when no call is in flight."""
        while self.in_flight:
            await self._changed.wait()

    def _all_passed(self, spans: Sequence[VersionSpan]) -> bool:
        return all(span.policy_version in self.passed for span in spans)

    async def _pass(self, version: int, wait: float) -> None:
        deadline = time.monotonic() + wait
        while True:
            self.refuse_refused()
            if self._phase is not PolicyState.SERVING:
                await self._changed.wait()
                continue
            if version <= self.policy_version:
                return
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                if self._phase is PolicyState.SERVING and version > self.policy_version:
                    raise self._too_old(version) from None

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _too_old(self, version: int) -> DomainError:
        return DomainError(
            Reason.POLICY_VERSION_TOO_OLD,
            f"version {self.policy_version} serves; at least {version} was asked for",
            policy_version=self.policy_version,
        )
