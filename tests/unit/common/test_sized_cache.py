"""A cache that is bounded by the bytes of its entries."""

from __future__ import annotations

from mulligan.common.sized_cache import SizedCache


def test_the_least_recently_used_make_room() -> None:
    cache: SizedCache[str] = SizedCache(100)
    cache.put("a", "first", 40)
    cache.put("b", "second", 40)
    assert cache.get("a") == "first"
    cache.put("c", "third", 50)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == ("first", None, "third")
    assert cache.bytes == 90


def test_what_is_larger_than_the_cache_displaces_nothing() -> None:
    cache: SizedCache[int] = SizedCache(100)
    cache.put("a", 1, 100)
    cache.put("b", 2, 101)
    assert cache.get("a") == 1 and cache.get("b") is None


def test_an_entry_that_comes_again_is_counted_once() -> None:
    cache: SizedCache[int] = SizedCache(100)
    for size in (60, 90, 10):
        cache.put("a", size, size)
        assert cache.get("a") == cache.bytes == size
