"""A run that waits for room on a disk."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from mulligan.common.disk import free_bytes
from mulligan.common.errors import DomainError

_FIRST_DELAY_SECONDS = 0.5
_MAX_DELAY_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_SPARE_BYTES = 2**18  # beyond what was to be written


class Pause:
    """Between the tries of a run. Call `over` when something was written since."""

    def __init__(self) -> None:
        self._delay = _FIRST_DELAY_SECONDS

    def over(self) -> None:
        self._delay = _FIRST_DELAY_SECONDS

    async def wait(self, full: DomainError, stop: asyncio.Event) -> None:
        """Until there seems to be room for what failed with DISK_FULL, or `stop` is set.

        What is free may say nothing, where there is a quota or the disk is another machine's: then it returns after a
        while, longer each time, for another try.
        """
        folder = Path(full.metadata["folder"])
        wanted = max(int(full.metadata["needed_bytes"]), int(full.metadata["free_bytes"]) + 1) + _SPARE_BYTES
        end = time.monotonic() + _MAX_DELAY_SECONDS
        await _set(stop, self._delay)
        while not stop.is_set() and time.monotonic() < end and free_bytes(folder) < wanted:
            await _set(stop, _LOOK_SECONDS)
        self._delay = min(2 * self._delay, _MAX_DELAY_SECONDS)


async def _set(event: asyncio.Event, seconds: float) -> None:
    """Waits until it is set, but no longer than this."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
