"""Streams of tokens: decoded to text that later tokens do not change, and several of them merged into one."""

from __future__ import annotations

import asyncio
import string
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from mulligan.common.tasks import cancel

T = TypeVar("T")
_UNDECODABLE = "\ufffd"  # what decoders make of bytes that are no character, or not yet
_RARE = "\U0010fffd"  # a character for private use: no tokenizer has it, only its bytes
_AHEAD = 64  # parts that wait for a caller who is slow


def unsettling_token(encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str]) -> int | None:
    """A token that can change the text of the tokens before it; None if the tokenizer has none.

    Some decoders (ByteFallback: Llama 2, Gemma) decode a row of byte tokens together, and as undecodable when any of
    them is. So the text of a byte token is certain only when another kind of token follows.
    """
    ids = encode(_RARE)
    if len(ids) < 2 or decode(ids) != _RARE or decode(ids[-1:]) != _UNDECODABLE:
        return None
    return None if decode([*ids, ids[-1]]).startswith(_RARE) else ids[-1]


class TextStream:
    """Decodes the tokens of one completion as they come: `push` returns the new text. All pieces together are the text
    of all tokens together.

    The bytes of a character may come in several tokens, so text that ends in undecodable bytes is held back until the
    next tokens; so is text that an `unsettling` token would change. The text of a token depends on those before it (a
    space between words, or none), so each is decoded together with those of the last piece. `raw_text` makes the raw
    text of a completion from all its tokens and its text.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        unsettling: int | None = None,
        raw_text: Callable[[Sequence[int], str], str] = lambda token_ids, text: "",
    ):
        self._decode = decode
        self._unsettling = unsettling
        self._raw_text = raw_text
        self._all: list[int] = []
        self._text = ""
        self._token_ids: list[int] = []  # those that text to come depends on
        self._shown = 0  # characters of their text that are out
        self._last = 0  # where the tokens begin that gave the last piece

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The new text. `last`: no more tokens come."""
        self._all += token_ids
        new = self._push(token_ids, last)
        self._text += new
        return new

    def raw(self) -> str:
        """Of all that was pushed, once it is complete."""
        return self._raw_text(self._all, self._text)

    def _push(self, token_ids: Sequence[int], last: bool) -> str:
        self._token_ids += token_ids
        text = self._decode(self._token_ids)
        certain = len(text) if last else self._certain(text)
        if certain <= self._shown:
            return ""
        new = text[self._shown : certain]
        self._shown = certain
        if certain == len(text):
            del self._token_ids[: self._last]
            if self._last:
                self._shown = len(self._decode(self._token_ids))
            self._last = len(self._token_ids)
        return new

    def _certain(self, text: str) -> int:
        """How many characters no later token can change."""
        base = len(text.rstrip(_UNDECODABLE + string.whitespace))  # some decoders put spaces between bytes
        incomplete = text.find(_UNDECODABLE, base)
        if incomplete >= 0:
            return incomplete if self._unsettling is None else self._shown
        if self._unsettling is not None and not self._decode([*self._token_ids, self._unsettling]).startswith(text):
            return self._shown
        return len(text)


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all streams, as they come. When one fails, or nobody listens any more, all are closed."""
    # An item, the failure of a stream, or None at the end of one.
    queue: asyncio.Queue[tuple[T] | Exception | None] = asyncio.Queue(_AHEAD)

    async def drain(stream: AsyncGenerator[T, None]) -> None:
        ended: Exception | None = None
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put((item,))
        except Exception as error:  # noqa: BLE001 - raised again where the items are taken
            ended = error
        await queue.put(ended)

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    left = len(tasks)
    try:
        while left:
            match await queue.get():
                case (item,):
                    yield item
                case Exception() as error:
                    raise error
                case None:
                    left -= 1
    finally:
        await cancel(*tasks)
