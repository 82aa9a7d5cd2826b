"""Makes foreign text fit to be shown: short enough, and without control characters."""

from __future__ import annotations

import json

JOINERS = "\u200c\u200d"  # invisible, and part of words and of emoji
_MARK_ROOM = 64  # characters for the note in the middle, in JSON form


def bounded(text: str, limit: int) -> str:
    """Returns `text`, cut to at most `limit` characters of its ASCII JSON form; `limit` is at least 100.

    A cut text consists of the beginning, the number of characters left out, and the end. Surrogates, which UTF-8 cannot
    encode, become escapes.
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


def safe(text: object) -> str:
    """The text with every control character (escape, carriage return, change of direction) as Python writes it, such as
    `\\x1b`. Line breaks and tabs stay."""
    return "".join(
        one if one.isprintable() or one in "\n\t" or one in JOINERS else one.encode("unicode_escape").decode()
        for one in str(text).encode("utf-8", "replace").decode()
    )


def one_line(text: object) -> str:
    """The same on a single line: line breaks and tabs are written as Python writes them."""
    return safe(text).replace("\n", "\\n").replace("\t", "\\t")
