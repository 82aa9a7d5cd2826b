"""Waiting for a condition, never for a time. The limit is for a test that is broken, not for a machine that is busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

PATIENCE_SECONDS = 300.0


async def until(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nobody tells when it changes
            await asyncio.sleep(0.02)


async def until_async(condition: Callable[[], Awaitable[bool]], seconds: float = PATIENCE_SECONDS) -> None:
    """Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - it belongs to a server
            await asyncio.sleep(0.01)


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """As `until`, where there is no event loop. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {seconds:g} s")
        time.sleep(0.02)
