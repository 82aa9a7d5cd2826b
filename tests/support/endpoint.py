"""An HTTP endpoint that answers what a test tells it to: for answers and faults that a real engine does not give on
demand. What a real one answers is in the contract suite."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mulligan.common.inference import Message, Role, SamplingParams
from mulligan.policy.backend import Ask, Sampled
from mulligan.policy.backends.openai import Settings as OpenAISettings
from mulligan.policy.backends.openai import open as open_backend
from mulligan.policy.backends.openai.backend import OpenAIBackend
from tests.support.settings import model_settings


@dataclass
class Reply:
    """`body` is sent as JSON, a string as it is; `events` as a stream, which breaks off when the last is None."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    events: list[Any] | None = None
    wait: bool = False  # never answer; or, in a stream, never end it


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class ScriptedEndpoint:
    """`answer` is called with each request. `gone` counts the clients that left before their answer ended."""

    answer: Callable[[Asked], Reply]
    asked: list[Asked] = field(default_factory=list)
    gone: int = 0
    port: int = 0
    tls: ssl.SSLContext | None = None
    _server: asyncio.Server | None = None
    _connections: dict[asyncio.Task[Any], asyncio.StreamWriter] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/v1"

    @property
    def chats(self) -> list[Any]:
        """Bodies of the requests for completions."""
        return [asked.body for asked in self.asked if asked.path.endswith("/chat/completions")]

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._connections.values():
            writer.close()
        await asyncio.gather(*self._connections)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        try:
            while line := await reader.readline():
                method, path, _ = line.decode().split()
                headers = {}
                while (header := (await reader.readline()).decode().strip()) != "":
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                asked = Asked(method, path, headers, json.loads(body) if body else None)
                self.asked.append(asked)
                await self._reply(self.answer(asked), reader, writer)
        except ConnectionError:
            pass
        finally:
            del self._connections[task]
            writer.close()

    async def _reply(self, reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if reply.events is None and reply.wait:
            return await self._until_gone(reader)
        if reply.events is None:
            plain = isinstance(reply.body, str)
            body = (reply.body if plain else json.dumps(reply.body)).encode()
            kind = "text/html" if plain else "application/json"
            self._head(writer, reply, kind, f"content-length: {len(body)}")
            writer.write(body)
            return await writer.drain()
        self._head(writer, reply, "text/event-stream", "connection: close")
        for event in reply.events:
            if event is None:
                break
            writer.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
            await writer.drain()
        if reply.wait:
            return await self._until_gone(reader)
        writer.close()
        return None

    @staticmethod
    def _head(writer: asyncio.StreamWriter, reply: Reply, kind: str, more: str) -> None:
        lines = [f"HTTP/1.1 {reply.status} -", f"content-type: {kind}", more]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def _until_gone(self, reader: asyncio.StreamReader) -> None:
        await reader.read()
        self.gone += 1
        raise ConnectionError


@asynccontextmanager
async def scripted(
    answer: Callable[[Asked], Reply], tls: ssl.SSLContext | None = None
) -> AsyncIterator[ScriptedEndpoint]:
    endpoint = ScriptedEndpoint(answer, tls=tls)
    await endpoint.start()
    try:
        yield endpoint
    finally:
        await endpoint.stop()


KEY = "sk-very-secret"
QUESTION = (Message(Role.USER, "hello"),)
MODELS = Reply({"object": "list", "data": [{"id": "m", "object": "model", "max_model_len": 4096}]})
SOON = {"retry-after-ms": "1"}


def choice(content: str | None = "fine", finish: str = "stop", **extra: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content} | extra.pop("message", {})
    return {"index": 0, "message": message, "finish_reason": finish} | extra


def answer(content: str | None = "fine", finish: str = "stop", tokens: int = 3, **extra: Any) -> Reply:
    usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
    return Reply(
        {"id": "1", "object": "chat.completion", "choices": [choice(content, finish, **extra)], "usage": usage}
    )


def delta(finish: str | None = None, /, **extra: Any) -> dict[str, Any]:
    last = extra.pop("last", {})
    return {
        "id": "1",
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": extra, "finish_reason": finish} | last],
    }


def usage(tokens: int) -> dict[str, Any]:
    counts = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
    return {"id": "1", "object": "chat.completion.chunk", "choices": [], "usage": counts}


def refusal(status: int, message: str, **extra: Any) -> Reply:
    return Reply({"error": {"message": message} | extra}, status, SOON)


def chats(*replies: Reply) -> Callable[[Asked], Reply]:
    """Lists the model, and answers one chat after another; the last reply for all that follow."""
    left = list(replies)
    return lambda asked: MODELS if asked.method == "GET" else left.pop(0) if len(left) > 1 else left[0]


@asynccontextmanager
async def backend(endpoint: ScriptedEndpoint, **changes: Any) -> AsyncIterator[OpenAIBackend]:
    chosen = {"base_url": endpoint.address, "api_key": KEY, "max_retries": 1} | changes.pop("openai", {})
    settings = model_settings(backend="openai", model="m", openai=OpenAISettings(**chosen), **changes)
    opened = await open_backend(settings, Path(), 4)
    assert isinstance(opened, OpenAIBackend)
    try:
        yield opened
    finally:
        await opened.close()


async def drained(opened: OpenAIBackend, ask: Ask) -> list[Sampled]:
    return [part async for part in opened.stream(ask)]


def asks(**sampling: Any) -> Ask:
    return Ask((), SamplingParams(**sampling), QUESTION)
