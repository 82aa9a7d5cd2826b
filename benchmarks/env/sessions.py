"""Plays many sessions at once, whoever serves them, and measures their steps; the load process of either side does.

A load process is told on its standard input what to play, a line of JSON each (a `Load`), and answers with a line of
JSON (a `LoadResult`). Only the standard library is imported: it runs in OpenEnv's environment, too.
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

# No move: an episode lasts until its step limit, so that all sessions of either side play the same number of steps.
ACTION = "I would rather think about it for a while, and say nothing that counts as an action. " * 3
STEPS = 8  # of an episode, FrozenLake's limit
TASKS = 512
_OPENING = 64  # sessions that are opened or closed at a time, as is reasonable for a client
T = TypeVar("T")


@dataclass(frozen=True)
class Load:
    """So many sessions at once, each of which plays so many episodes, one after another."""

    sessions: int
    episodes: int


@dataclass(frozen=True)
class LoadResult:
    """`errors`: sessions that failed, at whatever; they do not go on. `error`: what the first one said.

    `seconds` and the waits are of steps alone, episodes begin and end outside them; `begin_seconds` are theirs.
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
    """The sessions that are alive, and what they have seen."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.errors: list[str] = []

    async def tried(self, call: Coroutine[None, None, T]) -> T | None:
        """The result, or None when it failed, which is counted."""
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
        """The results of those that succeed."""
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
    """Measures what the standard input asks for, until it ends."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        measured = await measure(open_session, Load(**json.loads(line)))
        print(json.dumps(asdict(measured)), flush=True)
