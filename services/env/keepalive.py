"""Keeps an episode from expiring while its agent thinks for longer than the lease.

Any call renews a lease, and every call can be repeated. So the last one that was answered is made again, which changes
nothing and works at servers in any language.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog

from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable
from mulligan.common.tasks import cancel

log = structlog.get_logger()
_CALLS_PER_LEASE = 3  # two may be lost or late
_SHORTEST_WAIT_SECONDS = 0.02


@asynccontextmanager
async def kept_alive(
    episode_id: str, lease_seconds: float, repeat: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Within the block `repeat` is called several times in each lease. It may fail, which fails nothing else: the next
    step tells what has become of the episode. A lease of 0 is not known, and not renewed."""
    renewing = asyncio.create_task(_renew(episode_id, lease_seconds, repeat)) if lease_seconds > 0 else None
    try:
        yield
    finally:
        if renewing is not None:
            await cancel(renewing)


async def _renew(episode_id: str, lease_seconds: float, repeat: Callable[[], Awaitable[None]]) -> None:
    wait = max(lease_seconds / _CALLS_PER_LEASE, _SHORTEST_WAIT_SECONDS)
    while True:
        await asyncio.sleep(wait)
        try:
            async with asyncio.timeout(lease_seconds):
                await repeat()
        except (CallFailed, ServiceUnavailable, TimeoutError) as error:
            log.warning("a lease was not renewed", episode_id=episode_id, cause=str(error) or "no answer in time")
        except DomainError as error:  # it is lost, or over
            log.warning("a lease was not renewed, and will not be", episode_id=episode_id, cause=str(error))
            return
