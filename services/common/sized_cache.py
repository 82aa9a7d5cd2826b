"""A cache that is bounded by bytes: what callers send varies in size, so a number of entries would bound nothing."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

from cachetools import LRUCache

T = TypeVar("T")


class SizedCache(Generic[T]):
    """Values by key, of at most `most_bytes` in all. Those that were used least recently make room. Several threads may
    use it."""

    def __init__(self, most_bytes: int):
        self._lock = threading.Lock()
        self._kept: LRUCache[Hashable, tuple[T, int]] = LRUCache(most_bytes, getsizeof=lambda entry: entry[1])

    @property
    def bytes(self) -> int:
        """Of all entries, as `put` was told."""
        return int(self._kept.currsize)

    def get(self, key: Hashable) -> T | None:
        with self._lock:
            entry = self._kept.get(key)
        return None if entry is None else entry[0]

    def put(self, key: Hashable, value: T, size: int) -> None:
        """`size`: the bytes of the entry, its key included. One that is larger than the cache is not kept."""
        with self._lock:
            if size <= self._kept.maxsize:
                self._kept[key] = value, size
