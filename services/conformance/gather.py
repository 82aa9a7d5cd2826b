"""Calls at the same time."""

from __future__ import annotations

import asyncio
from typing import Any


async def gathered(awaitables: Any) -> list[Any]:
    """All results. After the first exception it waits for the rest, so that nothing goes on behind the check's back."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
