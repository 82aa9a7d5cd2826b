"""Plays many sessions at once and measures their steps. Both load processes, mulligan's and OpenEnv's, use it.

A load process reads lines of JSON (`Load`) from standard input and answers each with a line of JSON (`LoadResult`). It
imports only the standard library, because it also runs in OpenEnv's environment.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import asdict, dataclass
from typing import Protocol, TypeVar

# It is no move, so each episode lasts until its step limit: both sides play the same number of steps.
ACTION = "I would rather think about it for a while, and say nothing that counts as an action. " * 3
STEPS = 8  # of an episode, FrozenLake's limit
TASKS = 512
_OPENING = 64  # sessions that are opened or closed at a time
T = TypeVar("T")


@dataclass(frozen=True)
class Load:
    """The number of sessions at once, and of the episodes that each plays one after another."""

    sessions: int
    episodes: int


@dataclass(frozen=True)
class LoadResult:
    """`errors` is the number of failed sessions, which then stop; `error` is the first failure's text.

    `seconds` and the percentiles are of steps only. `begin_seconds` is the time in which episodes begin.
    """

    steps: int
    seconds: float
    begin_seconds: float
    p50_ms: float
    p99_ms: float
    errors: int
    error: str

    @property
    def rate(self) -> float:
        return self.steps / self.seconds if self.steps else 0.0


class LoadSession(Protocol):
    async def begin(self, task_id: str) -> None: ...

    async def step(self, action: str) -> None: ...

    async def end(self) -> None:
        """Ends the episode."""

    async def close(self) -> None: ...


class _Round:
    """The times and errors of the sessions in a round."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.errors: list[str] = []

    async def tried(self, call: Coroutine[None, None, T]) -> T | None:
        """The result, or None after a failure, which is counted."""
        try:
            return await call
        except Exception as error:  # noqa: BLE001 - whatever happens to a session is an error of that session
            self.errors.append(f"{type(error).__name__}: {error}"[:300])
            return None

    async def played(self, session: LoadSession) -> LoadSession:
        for _ in range(STEPS):
            start = time.perf_counter()
            await session.step(ACTION)
            self.waits.append(time.perf_counter() - start)
        return session

    async def all(self, calls: Iterable[Coroutine[None, None, T]]) -> list[T]:
        """The results of the calls that succeed."""
        found = await asyncio.gather(*(self.tried(call) for call in calls))
        return [result for result in found if result is not None]


async def measure(open_session: Callable[[], Awaitable[LoadSession]], load: Load) -> LoadResult:
    seen = _Round()
    places = asyncio.Semaphore(_OPENING)

    async def opened() -> LoadSession:
        async with places:
            return await open_session()

    async def begun(session: LoadSession, task: int) -> LoadSession:
        await session.begin(f"train/{task % TASKS:05d}")
        return session

    async def ended(session: LoadSession) -> LoadSession:
        await session.end()
        return session

    async def closed(session: LoadSession) -> None:
        async with places:
            await session.close()

    seconds = begin_seconds = 0.0
    all_sessions = alive = await seen.all(opened() for _ in range(load.sessions))
    for episode in range(load.episodes):
        start = time.perf_counter()
        alive = await seen.all(begun(session, task + episode) for task, session in enumerate(alive))
        begun_at = time.perf_counter()
        alive = await seen.all(seen.played(session) for session in alive)
        stepped_at = time.perf_counter()
        alive = await seen.all(ended(session) for session in alive)
        seconds += stepped_at - begun_at
        begin_seconds += begun_at - start
    await seen.all(closed(session) for session in all_sessions)
    waits = sorted(seen.waits)
    return LoadResult(
        len(waits),
        round(seconds, 6),
        round(begin_seconds, 6),
        _percentile_ms(waits, 50),
        _percentile_ms(waits, 99),
        len(seen.errors),
        seen.errors[0] if seen.errors else "",
    )


def _percentile_ms(ordered: list[float], percent: float) -> float:
    return round(ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] * 1e3, 3) if ordered else 0.0


async def answer(open_session: Callable[[], Awaitable[LoadSession]]) -> None:
    """Measures each load that standard input names, until it ends."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        measured = await measure(open_session, Load(**json.loads(line)))
        print(json.dumps(asdict(measured)), flush=True)
