"""Waiting for a condition, never for a time. The limit is for a test that is broken, not for a machine that is busy."""

from __future__ import annotations

import asyncio
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
