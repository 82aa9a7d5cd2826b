"""Commands that carry entries from one memory to another: `export`, `import`."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, MemoryAddress
from mulligan.cli.memory.entries import Scope, asked
from mulligan.cli.out import fail, json_safe, note, show
from mulligan.cli.progress import LiveLine, time_left
from mulligan.common.errors import DomainError, Reason
from mulligan.common.files import move, temporary_file
from mulligan.common.reflections import Labels, ReflectionStatus, StoredReflection
from mulligan.common.tasks import gather_or_cancel
from mulligan.common.validation import violations
from mulligan.memory import wire
from mulligan.memory.client import MemoryClient

_AT_ONCE = 32  # calls
_REQUEST = "import/"  # before the id that an entry had
_NEEDS_EMBEDDINGS = (
    "this memory takes no text without its embedding, and an exported file has none: nothing was imported. Expected a "
    "memory that embeds texts itself, or has no embedder; into this one a program adds them, by AddReflection"
)


def export(
    file: Annotated[Path | None, typer.Argument(help="Where to write; the standard output when left out.")] = None,
    scope: Scope = "",
    address: MemoryAddress = DEFAULT_ADDRESSES["memory"],
) -> None:
    """Write reflections as JSON, one a line, sources before what was made from them. Forgotten ones are left out.

    Example: `mulligan memory export reflections.jsonl --scope demo-1`
    """
    with LiveLine("reading the memory") as line:

        def tell(read: int) -> None:
            line.say(f"reading the memory: {read:,} reflections")

        entries = asked(address, lambda client: client.list(scope, on_progress=tell))
    if file is None:
        for entry in entries:
            show(_line(entry))
        return
    with temporary_file(file.absolute().parent) as written:
        with written.open("w", encoding="utf-8") as opened:
            opened.writelines(f"{_line(entry)}\n" for entry in entries)
        move(written, file.absolute())
    note(f"{len(entries):,} reflections written to {file}")


def _line(entry: StoredReflection) -> str:
    return json_safe(msgspec.json.encode(entry).decode())


def import_file(
    file: Annotated[Path, typer.Argument(help="As `mulligan memory export` wrote it.")],
    scope: Annotated[str, typer.Option(help="Where to put all of them; each into its own scope when left out.")] = "",
    address: MemoryAddress = DEFAULT_ADDRESSES["memory"],
) -> None:
    """Add the reflections of a file. What is there already is left as it is, so an import can be repeated.

    Evidence is not imported: it is of the attempts of other runs. What was active is a candidate again, and what was
    quarantined is retired. Embeddings are not in the file: the memory makes them. One whose callers bring them
    (embedder = "given") imports nothing.

    Example: `mulligan memory import reflections.jsonl --scope shared`
    """
    entries = _read(file, scope)
    with LiveLine(f"importing {len(entries):,} reflections") as line:
        began = time.monotonic()

        def tell(done: int) -> None:
            left = time_left(time.monotonic() - began, done, len(entries))
            line.say(f"importing reflections: {done:,}/{len(entries):,}, left {left}")

        counts = asked(address, lambda client: _Import(client, scope, tell).all(entries))
    show(f"{counts['added']:,} added, {counts['known']:,} were there already")
    statuses = Counter(entry.status for entry in entries)
    active, quarantined = statuses[ReflectionStatus.ACTIVE], statuses[ReflectionStatus.QUARANTINED]
    note(f"evidence is not imported: {active:,} active are candidates, {quarantined:,} quarantined are retired")
    if counts["sources"]:
        note(f"{counts['sources']:,} sources were left out: they are not in the file, or were not imported")
    if counts["changed"]:
        fail(f"{counts['changed']:,} were imported before with another content, and were left as they are")


def _read(file: Path, scope: str) -> list[StoredReflection]:
    """Ends the program for a line that is no reflection which a memory takes, or that has a source in a later line."""
    entries: list[StoredReflection] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=StoredReflection)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            fail(f"{file}, line {number}: {error}", 2)
        if problems := _problems(entry, scope):
            fail(f"{file}, line {number}: {problems[0]}", 2)
        if entry.reflection_id in lines:
            fail(f"{file}, line {number}: {entry.reflection_id!r} was in line {lines[entry.reflection_id]}", 2)
        lines[entry.reflection_id] = number
        entries.append(entry)
    for entry in entries:
        for source in entry.source_ids:
            if lines.get(source, 0) >= lines[entry.reflection_id]:
                fail(f"{file}, line {lines[entry.reflection_id]}: its source {source!r} has to come before it", 2)
    return entries


def _problems(entry: StoredReflection, scope: str) -> Sequence[object]:
    """Why no memory would take it, by the contract."""
    request_id = f"{_REQUEST}{entry.reflection_id}"
    labels = Labels(entry.kind, entry.key, entry.tags, entry.source_ids)
    return violations(wire.addition_to_proto(request_id, scope or entry.scope, entry.text, entry.provenance, labels))


class _Import:
    """Adds entries, several at once, each after its sources."""

    def __init__(self, client: MemoryClient, scope: str, tell: Callable[[int], None]) -> None:
        self._client = client
        self._tell = tell  # how many are done
        self._done = 0
        self._scope = scope
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._counts: Counter[str] = Counter()
        self._there: dict[str, set[str]] = {}  # ids, by scope
        self._ids: dict[str, asyncio.Future[str]] = {}  # from an id in the file to that in the memory

    async def all(self, entries: Iterable[StoredReflection]) -> Counter[str]:
        """How many were added, known before, known with another content; and how many sources are missing."""
        moved = [replace(entry, scope=self._scope or entry.scope) for entry in entries]
        for scope in {entry.scope for entry in moved}:
            known = await self._client.list(scope, include_deleted=True)
            self._there[scope] = {entry.reflection_id for entry in known}
        loop = asyncio.get_running_loop()
        self._ids = {entry.reflection_id: loop.create_future() for entry in moved}
        await gather_or_cancel(self._one(entry) for entry in moved)
        return self._counts

    async def _one(self, entry: StoredReflection) -> None:
        known = [await self._ids[source] for source in entry.source_ids if source in self._ids]
        sources = tuple(dict.fromkeys(filter(None, known)))
        self._counts["sources"] += len(entry.source_ids) - len(sources)
        async with self._slots:
            self._ids[entry.reflection_id].set_result(await self._added(entry, sources))
            self._done += 1
            self._tell(self._done)

    async def _added(self, entry: StoredReflection, sources: tuple[str, ...]) -> str:
        """Its id in the memory; empty if another content was imported under it."""
        there = self._there[entry.scope]
        if entry.reflection_id in there:  # it was exported from here
            self._counts["known"] += 1
            return entry.reflection_id
        request_id = f"{_REQUEST}{entry.reflection_id}"
        labels = Labels(entry.kind, entry.key, entry.tags, sources)
        try:
            identity = await self._client.add(request_id, entry.scope, entry.text, entry.provenance, labels)
        except DomainError as error:
            if error.reason is Reason.INVALID_FIELD and error.metadata.get("field") == "embedding":
                raise error.told(f"{_NEEDS_EMBEDDINGS} ({error.message})") from error
            if error.reason is not Reason.REQUEST_CONFLICT:
                raise
            self._counts["changed"] += 1
            return ""
        self._counts["known" if identity in there else "added"] += 1
        if entry.status in (ReflectionStatus.RETIRED, ReflectionStatus.QUARANTINED):
            await self._retire(identity, request_id)
        return identity

    async def _retire(self, identity: str, request_id: str) -> None:
        """Unless somebody changed or forgot it since it was imported."""
        try:
            await self._client.revise(identity, request_id, 1, status=ReflectionStatus.RETIRED)
        except DomainError as error:
            if error.reason not in (Reason.REVISION_CONFLICT, Reason.UNKNOWN_REFLECTION):
                raise
