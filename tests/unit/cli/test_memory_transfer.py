"""What `mulligan memory export` and `import` say while they last."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mulligan.cli.memory import transfer
from mulligan.common.channel import Endpoint
from mulligan.common.reflections import Provenance, StoredReflection
from mulligan.memory import wire
from mulligan.memory.client import MemoryClient
from mulligan.memory.v1 import memory_service_pb2 as pb

ORIGIN = Provenance("run", "e", "lake", "t", 1, 0.0, 1.0, True)
ENTRIES = [StoredReflection(f"id-{n}", "run", f"lesson {n}", ORIGIN, n + 1, datetime.now(UTC)) for n in range(7)]


class Served(MemoryClient):
    """A memory of three entries a page, which gives what is added the id of its request."""

    def __init__(self, entries: list[StoredReflection]):
        super().__init__(Endpoint("127.0.0.1:1"))
        self._stub = self  # type: ignore[assignment]
        self._entries = entries

    async def ListReflections(self, request: pb.ListReflectionsRequest, **_: Any) -> pb.ListReflectionsResponse:
        begin = int(request.page_token or 0)
        page = self._entries[begin : begin + 3]
        more = str(begin + 3) if begin + 3 < len(self._entries) else ""
        return pb.ListReflectionsResponse(reflections=map(wire.reflection_to_proto, page), next_page_token=more)

    async def add(self, request_id: str, *_: object, **__: object) -> str:
        return request_id


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []

    class Line:
        def __init__(self, text: str):
            texts.append(text)

        def __enter__(self) -> Line:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def say(self, text: str) -> None:
            texts.append(text)

    monkeypatch.setattr(transfer, "LiveLine", Line)
    return texts


def serve(monkeypatch: pytest.MonkeyPatch, entries: list[StoredReflection]) -> None:
    def asked(address: str, what: Callable[[MemoryClient], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            client = Served(entries)
            try:
                return await what(client)
            finally:
                await client.close()

        return asyncio.run(main())

    monkeypatch.setattr(transfer, "asked", asked)


def test_an_export_says_how_much_it_has_read(said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serve(monkeypatch, ENTRIES)
    transfer.export(tmp_path / "file.jsonl", "run", "127.0.0.1:1")
    assert said == ["reading the memory", *(f"reading the memory: {n} reflections" for n in (3, 6, 7))]


def test_an_import_says_how_much_is_done_and_how_long_the_rest_may_take(
    said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, [])
    file = tmp_path / "file.jsonl"
    file.write_bytes(b"\n".join(map(msgspec.json.encode, ENTRIES)))
    transfer.import_file(file, "other", "127.0.0.1:1")
    assert "7 added" in capsys.readouterr().out
    assert said[0] == "importing 7 reflections"
    for number, text in enumerate(said[1:], 1):
        assert re.fullmatch(rf"importing reflections: {number}/7, left 0:00:0\d", text)
    assert len(said) == 8
