"""Messages between the server and the processes of untrusted environments: length, then msgpack. Never pickle.

A message may carry a file descriptor: the socket on which a new process is to talk.
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
    """`do` is "isolation", "load" (a table), "start" (a task), "list" (tasks) or "end" (a process); for the process of
    an episode, "step" or "fork"."""

    do: str
    text: str = ""  # name of the environment, task or action
    table: dict[str, Any] = {}
    split: str = ""
    offset: int = 0
    limit: int = 0
    process: int = 0


class SandboxReply(msgspec.Struct):
    """`problem` is empty if there is a `result`. `kind` marks problems that the server handles in their own way."""

    result: msgspec.Raw = msgspec.Raw(b"\xc0")  # nothing
    problem: str = ""
    kind: str = ""


class EpisodeStarted(msgspec.Struct):
    """The first observation of an episode. `process` is the process id if the server does not know it yet."""

    observation: str = ""
    player: int = 0
    process: int = 0


class Garbled(Exception):
    """A message cannot be parsed or is too long. The text says what the other side did."""


def send(
    connection: socket.socket, message: object, descriptor: int | None = None, seconds: float | None = None
) -> None:
    """Sends a message. Raises Garbled for one that is too long, TimeoutError when the other side does not read, and
    OSError when it is gone."""
    connection.settimeout(seconds)
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise Garbled(f"has an answer of {len(body)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    data = memoryview(_HEADER.pack(len(body)) + body)
    sent = socket.send_fds(connection, [data], [descriptor]) if descriptor is not None else 0
    connection.sendall(data[sent:])


def receive(connection: socket.socket, kind: type[T], seconds: float | None = None) -> tuple[T, int | None] | None:
    """Receives a message and its descriptor, if it has one; None when the other side is gone. Raises TimeoutError and
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
            raise Garbled(f"announced an answer of {length} bytes; the limit is {MAX_MESSAGE_BYTES}")
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
        raise Garbled(f"wrote an invalid answer: {error}") from error


def _part(connection: socket.socket, size: int, deadline: float | None) -> bytes:
    if deadline is not None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
    return connection.recv(min(size, 2**20))
