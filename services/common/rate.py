"""A limit on how often something may happen: a token bucket. https://en.wikipedia.org/wiki/Token_bucket"""

from __future__ import annotations

import time


class TokenBucket:
    """`burst` times at once, and after them `per_second` times per second."""

    __slots__ = ("_burst", "_counted_at", "_left", "_per_second")

    def __init__(self, per_second: float, burst: float):
        self._per_second = per_second
        self._burst = burst
        self._left = burst
        self._counted_at = time.monotonic()

    def take(self) -> bool:
        """Whether it may happen now; if so, it counts."""
        now = time.monotonic()
        self._left = min(self._left + (now - self._counted_at) * self._per_second, self._burst)
        self._counted_at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
