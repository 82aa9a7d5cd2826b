"""The calls that wait for a service: it is told once, however many they are, and can be asked at any time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from mulligan.common.errors import DomainError

log = structlog.get_logger()
_SHOWN_AFTER_SECONDS = 1.0


class Waits:
    """Of one service. `tell` gets a text when calls begin to wait, and one when the service answers again.

    `text` says what calls wait for; "" if none does, or if another call was answered a moment ago: a service that is
    full answers some.
    """

    def __init__(self, endpoint: str, tell: Callable[[str], None] | None = None):
        self._endpoint = endpoint
        self._tell = tell
        self._calls = 0
        self._cause = ""
        self._began = 0.0
        self._answered = 0.0

    @property
    def text(self) -> str:
        silent = time.monotonic() - max(self._began, self._answered)
        if not self._calls or silent < _SHOWN_AFTER_SECONDS:
            return ""
        return f"waiting for {self._endpoint}: {self._cause}"

    @contextmanager
    def call(self) -> Iterator[Wait]:
        """Around a call with all its tries. Unless it says so itself, it got an answer if a DomainError leaves it."""
        wait = Wait(self)
        try:
            yield wait
        except DomainError:
            wait.answered()
            raise
        finally:
            if wait.is_on:
                self._calls -= 1

    def begin(self, cause: str) -> None:
        self._calls += 1
        if self._calls == 1:
            self._began = time.monotonic()
            if self._tell is not None:
                log.warning("waiting for a service", endpoint=self._endpoint, cause=cause)
                self._tell(f"waiting for {self._endpoint}: {cause}")

    def because(self, cause: str) -> None:
        self._cause = cause

    def end(self) -> None:
        """A call that waited has its answer."""
        self._calls -= 1
        if self._calls == 0 and self._tell is not None:
            seconds = time.monotonic() - self._began
            log.info("a service answers again", endpoint=self._endpoint, seconds=round(seconds, 1))
            self._tell(f"{self._endpoint} answers again, after {seconds:.0f} s")

    def answered(self) -> None:
        self._answered = time.monotonic()


class Wait:
    """One call's."""

    def __init__(self, waits: Waits):
        self._waits = waits
        self.is_on = False

    def begin(self, cause: str) -> None:
        """The call has to wait, or to wait on."""
        self._waits.because(cause)
        if not self.is_on:
            self.is_on = True
            self._waits.begin(cause)

    def answered(self) -> None:
        self._waits.answered()
        if self.is_on:
            self.is_on = False
            self._waits.end()
