"""Messages between the server and the processes of untrusted environments: their length, then msgpack; never pickle.

A message may carry a file descriptor: the end of a pair of sockets on which a new process is to talk.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Any, TypeVar

import msgspec

MAX_MESSAGE_BYTES = 16 * 2**20
_HEADER = struct.Struct(">I")
T = TypeVar("T")


class SandboxRequest(msgspec.Struct):
    """`do`: load (a table), start (a task), list (tasks), end (a process); and to an episode's process: step, fork."""

    do: str
    text: str = ""  # the environment's name, the task or the action
    table: dict[str, Any] = {}
    split: str = ""
    offset: int = 0
    limit: int = 0
    process: int = 0


class SandboxReply(msgspec.Struct):
    """`problem` is empty where `result` is one. `kind` tells problems apart that mean something to the server."""

    result: msgspec.Raw = msgspec.Raw(b"\xc0")  # nothing
    problem: str = ""
    kind: str = ""


class EpisodeStarted(msgspec.Struct):
    """What an episode shows first. `process` is its id where the server does not know it yet."""

    observation: str = ""
    player: int = 0
    process: int = 0


class Garbled(Exception):
    """What came, or is to be sent, is no message, or too long a one. The text says what the other side did."""


def send(
    connection: socket.socket, message: object, descriptor: int | None = None, seconds: float | None = None
) -> None:
    """Raises Garbled for a message that is too long, OSError when the other side is gone, and TimeoutError, which is
    one, when it takes nothing in."""
    connection.settimeout(seconds)
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise Garbled(f"has an answer of {len(body)} bytes; there may be {MAX_MESSAGE_BYTES}")
    data = memoryview(_HEADER.pack(len(body)) + body)
    sent = socket.send_fds(connection, [data], [descriptor]) if descriptor is not None else 0
    connection.sendall(data[sent:])


def receive(connection: socket.socket, kind: type[T], seconds: float | None = None) -> tuple[T, int | None] | None:
    """The next message with its descriptor, if it has one; None where the other side is gone. Raises TimeoutError,
    Garbled."""
    deadline = None if seconds is None else time.monotonic() + seconds
    connection.settimeout(seconds)
    try:
        header, descriptors, _, _ = socket.recv_fds(connection, _HEADER.size, 1)
        while 0 < len(header) < _HEADER.size:
            part = _part(connection, _HEADER.size - len(header), deadline)
            header = header + part if part else b""
        if not header:
            return None
        (length,) = _HEADER.unpack(header)
        if length > MAX_MESSAGE_BYTES:
            raise Garbled(f"announced an answer of {length} bytes; there may be {MAX_MESSAGE_BYTES}")
        body = bytearray()
        while len(body) < length:
            part = _part(connection, length - len(body), deadline)
            if not part:
                return None
            body += part
    except ConnectionError:
        return None
    try:
        return msgspec.msgpack.decode(body, type=kind), descriptors[0] if descriptors else None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Garbled(f"wrote what is no answer: {error}") from error


def _part(connection: socket.socket, size: int, deadline: float | None) -> bytes:
    if deadline is not None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
    return connection.recv(min(size, 2**20))
