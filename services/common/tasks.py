"""Helpers for asyncio tasks: gather, cancel, wake."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. After the first failure the others are cancelled and waited for, and that failure is
    raised as it is: an `asyncio.TaskGroup` alone would raise an ExceptionGroup."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        first = failures.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise first


async def cancel(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancels what still runs and waits until all have ended. Their results and errors are dropped; None is ignored."""
    present = [task for task in tasks if task is not None]
    for task in present:
        task.cancel()
    await asyncio.gather(*present, return_exceptions=True)


class Broadcast:
    """Wakes every task that waits at that moment. Those that wait later sleep until the next time.

    An `asyncio.Event` has to be cleared for that, and an `asyncio.Condition` needs a lock.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()

    def wake_all(self) -> None:
        self._event.set()
        self._event = asyncio.Event()
