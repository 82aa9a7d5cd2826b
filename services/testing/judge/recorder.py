"""Records each call that a process makes as a client of the services.

`record_calls` replaces what opens the channels of `mulligan.common.channel`. The services themselves know nothing of
it: tests and proofs start them by `launch.py`, which calls it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from mulligan.common import channel
from mulligan.common.errors import DomainError
from mulligan.common.status import from_rpc_error

_LONGEST = 8  # numbers of a list that are written
_PROBES = ("/grpc.",)  # methods that begin so are not recorded
_WHOLE = ("/CreateLearner", "/ForwardBackward")  # methods that end so are recorded as they are, besides
_SECRET = "credential"  # a field that is left out
Sink = Callable[[bytes], None]


class CallRecorder:
    """Writes two lines for each call: one before it is made, and one when it has ended."""

    def __init__(self, sink: Sink, caller: str):
        self._sink = sink
        self._caller = caller
        self._numbers = itertools.count()

    def begin(self, method: str, request: Any, credential: str = "") -> int:
        number = next(self._numbers)
        asked, digest = (plain(request), digest_of(request)) if isinstance(request, Message) else ({}, "")
        line: dict[str, Any] = {"call": number, "caller": self._caller, "credential": credential, "method": method}
        if isinstance(request, Message) and method.endswith(_WHOLE):
            line["whole"] = base64.b64encode(request.SerializeToString()).decode()
        self._write(line | {"request": asked, "digest": digest, "start": time.monotonic()})
        return number

    def end(self, number: int, answer: Any, error: BaseException | None = None) -> None:
        """`answer` is a message, or a list of those of a stream; None without one."""
        line: dict[str, Any] = {"call": number, "end": time.monotonic()}
        messages = answer if isinstance(answer, list) else [answer] if answer is not None else []
        if messages:
            line |= {"answer": _joined(map(plain, messages)), "answer_digest": digest_of(*messages)}
        elif isinstance(answer, list) and error is None:
            line |= {"answer": {}, "answer_digest": ""}
        self._write(line | _failure(error))

    def _write(self, line: Mapping[str, Any]) -> None:
        self._sink(json.dumps(line).encode() + b"\n")


def to_file(path: Path) -> Sink:
    """One call of the system for each line: what was written survives the end of the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab", buffering=0).write  # type: ignore[return-value]  # it returns the count of bytes


def to_socket(path: Path) -> Sink:
    """To `Collector`: a process whose files may not grow writes nothing of its own."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection.sendall


def record_calls(recorder: CallRecorder, patch: Callable[[object, str, Any], None] = setattr) -> None:
    """From now on all connections of this process that are opened record their calls."""
    opening = channel.open_channel
    patch(channel, "open_channel", lambda *arguments: _RecordedChannel(opening(*arguments), recorder))


@contextmanager
def recorded(recorder: CallRecorder) -> Iterator[None]:
    """As `record_calls`, until the end of the block."""
    opening = channel.open_channel
    record_calls(recorder)
    try:
        yield
    finally:
        channel.open_channel = opening


class _RecordedChannel:
    """Stands for the channel of a stub."""

    def __init__(self, opened: grpc.aio.Channel, recorder: CallRecorder):
        self._opened = opened
        self._recorder = recorder

    def unary_unary(self, method: str, **options: Any) -> Callable[..., Any]:
        return self._one_answer(method, self._opened.unary_unary(method, **options))

    def stream_unary(self, method: str, **options: Any) -> Callable[..., Any]:
        return self._one_answer(method, self._opened.stream_unary(method, **options))

    def unary_stream(self, method: str, **options: Any) -> Callable[..., Any]:
        call: Any = self._opened.unary_stream(method, **options)
        if method.startswith(_PROBES):
            return call  # type: ignore[no-any-return]
        return lambda request, **keywords: _Stream(self._recorder, method, request, call(request, **keywords))

    def _one_answer(self, method: str, call: Any) -> Callable[..., Any]:
        async def recorded(request: Any, **keywords: Any) -> Any:
            number = self._recorder.begin(method, request)
            try:
                answer = await call(request, **keywords)
            except BaseException as error:
                self._recorder.end(number, None, error)
                raise
            self._recorder.end(number, answer)
            return answer

        return call if method.startswith(_PROBES) else recorded

    async def close(self) -> None:
        await self._opened.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Stream:
    """Stands for a call with a streamed answer."""

    def __init__(self, recorder: CallRecorder, method: str, request: Any, call: Any):
        self._recorder = recorder
        self._call = call
        self._number = recorder.begin(method, request)
        self._messages: list[Message] = []
        self._is_over = False

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for message in self._call:
                self._messages.append(message)
                yield message
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    def cancel(self) -> bool:
        self._end(asyncio.CancelledError())
        return bool(self._call.cancel())

    def _end(self, error: BaseException | None) -> None:
        if not self._is_over:
            self._is_over = True
            self._recorder.end(self._number, self._messages, error)


def digest_of(*messages: Message) -> str:
    return hashlib.sha256(b"\0".join(one.SerializeToString(deterministic=True) for one in messages)).hexdigest()[:16]


def plain(message: Message) -> dict[str, Any]:
    """The fields that are set, as JSON has them. Long lists of numbers, and bytes, are their lengths. Credentials are
    left out."""
    return {field.name: _plain(field, value) for field, value in message.ListFields() if field.name != _SECRET}


def _plain(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {str(name): plain(one) if isinstance(one, Message) else one for name, one in value.items()}
    if field.is_repeated:
        if field.message_type is not None:
            return [plain(one) for one in value]
        return list(value) if len(value) <= _LONGEST or isinstance(value[0], str) else len(value)
    if field.message_type is not None:
        return plain(value)
    return len(value) if isinstance(value, bytes) else value


def _joined(messages: Any) -> dict[str, Any]:
    """The lists of all messages, one after the other."""
    found: dict[str, Any] = {}
    for message in messages:
        for name, value in message.items():
            found[name] = found[name] + value if isinstance(value, list) and name in found else value
    return found


def _failure(error: BaseException | None) -> dict[str, str]:
    if error is None:
        return {}
    if not isinstance(error, grpc.aio.AioRpcError):
        return {"code": type(error).__name__, "reason": ""}
    declared = from_rpc_error(error)
    return {"code": error.code().name, "reason": declared.reason if isinstance(declared, DomainError) else ""}
