"""A caller that speaks HTTP/2 by itself, and does what no gRPC library does: half-sent messages, answers that it does
not read, torn frames, any number of streams.  https://www.rfc-editor.org/rfc/rfc9113"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
_MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW = 3, 4
_MOST_OF_A_FRAME = 16_384


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def message(content: bytes, length: int | None = None) -> bytes:
    """A gRPC message, with the length that it has or another one."""
    return struct.pack(">BI", 0, len(content) if length is None else length) + content


def header_block(fields: Mapping[bytes, bytes]) -> bytes:
    """Literal fields without indexing or Huffman codes.  https://www.rfc-editor.org/rfc/rfc7541#section-6.2.2"""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields.items())


def _text(content: bytes) -> bytes:
    size = len(content)
    if size < 127:
        return bytes([size]) + content
    size -= 127
    prefix = bytearray([127])
    while size >= 128:
        prefix.append(size % 128 + 128)
        size //= 128
    return bytes([*prefix, size]) + content


def call_headers(path: bytes) -> dict[bytes, bytes]:
    return {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path,
        b":authority": b"localhost",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
    }


def literal(name: bytes, value: bytes) -> bytes:
    """How a header field looks in the first headers of a connection that have this field."""
    return _text(name) + _text(value)


@dataclass
class _Stream:
    window: int
    received: int = 0  # bytes of DATA
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    reset: int | None = None  # the code of RST_STREAM
    headers: bytes = b""  # as they came, not decoded


class RawConnection:
    """`window` is what the server may send of each stream before `widen` gives it more."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int):
        self._reader = reader
        self.writer = writer
        self._own_window = window
        self._stream_window = 65_535
        self.window = 65_535  # of the connection
        self.streams: dict[int, _Stream] = {}
        self.max_streams: int | None = None  # as the server announces it
        self.closed = asyncio.Event()
        self._changed = asyncio.Event()
        self._next = 1
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.writer.write(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW, self._own_window)))
        self.writer.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30)))
        self._task = asyncio.create_task(self._receive())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self.writer.transport.abort()

    def begin(self, path: bytes, metadata: Mapping[bytes, bytes] | None = None, *, end: bool = False) -> int:
        """Sends the headers of a call, and returns the number of its stream."""
        stream, self._next = self._next, self._next + 2
        fields = call_headers(path) | dict(metadata or {})
        self.streams[stream] = _Stream(self._stream_window)
        self.writer.write(frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, header_block(fields)))
        return stream

    async def send(self, stream: int, content: bytes, *, end: bool = False) -> int:
        """Sends as much as the server takes, and returns how many bytes that were: all, unless the stream ended."""
        sent = 0
        state = self.streams[stream]
        while sent < len(content) and not state.ended.is_set() and not self.closed.is_set():
            room = min(self.window, state.window, _MOST_OF_A_FRAME, len(content) - sent)
            if room <= 0:
                self._changed.clear()
                await self._changed.wait()
                continue
            last = end and sent + room == len(content)
            self.writer.write(frame(DATA, END_STREAM if last else 0, stream, content[sent : sent + room]))
            self.window -= room
            state.window -= room
            sent += room
            with suppress(ConnectionError):
                await self.writer.drain()
        return sent

    def widen(self, stream: int, window: int) -> None:
        """Lets the server send more of a stream."""
        self.writer.write(frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", window)))

    async def _receive(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                size = int.from_bytes(head[:3], "big")
                payload = await self._reader.readexactly(size)
                self._take(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
                self._changed.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed.set()
            self._changed.set()
            for stream in self.streams.values():
                stream.ended.set()

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if number in self.streams:
            self._take_of_stream(self.streams[number], kind, flags, payload)
        elif kind == SETTINGS and not flags & ACK:
            for place in range(0, len(payload), 6):
                self._set(*struct.unpack_from(">HI", payload, place))
            self.writer.write(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self.writer.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE and number == 0:
            self.window += int.from_bytes(payload, "big")

    def _set(self, setting: int, value: int) -> None:
        if setting == _INITIAL_WINDOW:
            for stream in self.streams.values():
                stream.window += value - self._stream_window
            self._stream_window = value
        elif setting == _MAX_CONCURRENT_STREAMS:
            self.max_streams = value

    @staticmethod
    def _take_of_stream(stream: _Stream, kind: int, flags: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            stream.window += int.from_bytes(payload, "big")
        elif kind == DATA:
            stream.received += len(payload)
        elif kind == HEADERS:
            stream.headers += payload
        elif kind == RST_STREAM:
            stream.reset = int.from_bytes(payload, "big")
        if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
            stream.ended.set()


@asynccontextmanager
async def raw_connection(
    address: str, *, window: int = 65_535, source: str | None = None
) -> AsyncIterator[RawConnection]:
    """`source` is the address that it comes from."""
    host, _, port = address.rpartition(":")
    local = (source, 0) if source else None
    connection = RawConnection(*await asyncio.open_connection(host, int(port), local_addr=local), window)
    await connection.start()
    try:
        yield connection
    finally:
        await connection.close()
