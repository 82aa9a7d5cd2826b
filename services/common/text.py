"""Text that came from elsewhere, made short enough to be logged and sent on."""

from __future__ import annotations

import json

_MARK_ROOM = 64  # for the note in the middle, as JSON writes it


def bounded(text: str, limit: int) -> str:
    """`text`, at most `limit` characters long as ASCII JSON writes it. Of a longer one, the beginning and the end with
    the number of characters that are left out. Surrogates, which UTF-8 cannot carry, become escapes.

    `limit` is at least 100.
    """
    if len(text) * 6 <= limit and text.isascii():  # JSON needs at most six characters for one
        return text
    if len(text) <= limit and _size(whole := _encodable(text)) <= limit:
        return whole
    room = limit - _MARK_ROOM
    head = _encodable(text[:room])
    while (size := _size(head)) > room * 3 // 4:
        head = head[: len(head) * (room * 3 // 4) // size]
    tail = _encodable(text[-room:])
    while (size := _size(tail)) > room // 4:
        tail = tail[len(tail) - len(tail) * (room // 4) // size :]
    return f"{head} … {len(text) - len(head) - len(tail):,} characters left out … {tail}"


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _size(text: str) -> int:
    return len(json.dumps(text)) - 2
