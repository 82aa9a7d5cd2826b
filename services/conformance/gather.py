"""Calls at the same time."""

from __future__ import annotations

import asyncio
from typing import Any


async def gathered(awaitables: Any) -> list[Any]:
    """All results. After an exception it waits for the rest and then raises it, so that no call outlives the check."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
