"""Writers that call a memory service at once, and note what they ask and what they are answered (`memory_ledger.py`).

`python -m mulligan.testing.memory_writers FOLDER [--calls N] [--seed N]` starts a service on a new database in the
folder, has N calls answered, and kills it; `power_loss.py` records what it writes.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason, ServiceUnavailable
from mulligan.common.reflections import (
    Labels,
    ReflectionKind,
    ReflectionQuery,
    RetrievalStrategy,
    Trial,
    UseOutcome,
)
from mulligan.memory.client import MemoryClient
from mulligan.testing import power_loss
from mulligan.testing.memory_ledger import CONFLICT, ORIGIN, Call, Ledger, check_sqlite, promise
from mulligan.testing.processes import ProcessFailed, ServiceProcess, ServiceProcesses

T = TypeVar("T")

DATA = "data"  # the folder of the database and the ledger
DATABASE = "memory.db"
LEDGER = "ledger.jsonl"
SCOPES = ("one", "two")
_DOCUMENTS = 2  # of a scope
_WRITERS = 8
_KINDS = {"add": 8, "revise": 4, "draw": 4, "report": 4, "read": 2, "delete": 1, "erase": 1}  # and their weights
_DRAWN = 4  # uses of one draw
_RETRIEVED = 3  # entries
_READ = 5
_REPEATED = 0.2  # share of the reports that are made once more
_REWARDS = (0.0, 0.25, 0.5, 1.0)  # sums of them are exact
_ANSWERS = 150  # before a kill, at most
_STARTING = 0.15  # share of the kills that another one follows, while the service starts
_START_SECONDS = 2.0


class Gone(Exception):
    """The service does not answer any more."""


class Writers:
    """Calls chosen by chance. One without an answer is made again, as it was, by the next `write`."""

    def __init__(self, ledger: Ledger, chance: random.Random) -> None:
        self._ledger = ledger
        self._chance = chance
        self._unsure: set[int] = set()  # calls that cannot be made again as they were
        self._rules: dict[str, list[str]] = {scope: [] for scope in SCOPES}  # that nobody deleted
        self._documents: dict[str, list[str]] = {scope: [] for scope in SCOPES}
        self._drawn: dict[str, list[list[list[str]]]] = {scope: [] for scope in SCOPES}  # uses without a report

    async def write(self, client: MemoryClient, calls: float = float("inf")) -> None:
        """Until so many calls were answered, or the service is gone. Raises BrokenPromise, in a group."""
        until = len(self._ledger.answers) + calls
        try:
            for number in self._ledger.open:
                if number not in self._unsure:
                    await self._make(client, number, again=True)
            for scope in SCOPES:
                while len(self._documents[scope]) < _DOCUMENTS:
                    await self._make(client, self._add(scope, ReflectionKind.DOCUMENT))
        except Gone:
            return
        async with asyncio.TaskGroup() as group:
            for _ in range(_WRITERS):
                group.create_task(self._write(client, until))

    async def _write(self, client: MemoryClient, until: float) -> None:
        try:
            while len(self._ledger.answers) < until:
                (do,) = self._chance.choices(list(_KINDS), list(_KINDS.values()))
                number = await self._choose(client, do, self._chance.choice(SCOPES))
                if number is not None:
                    await self._make(client, number)
        except Gone:
            return

    async def _choose(self, client: MemoryClient, do: str, scope: str) -> int | None:
        """Notes a call; None if there is nothing yet to call with."""
        if do == "add":
            return self._add(scope, self._chance.choice((ReflectionKind.RULE, ReflectionKind.EPISODE)))
        if do == "revise":
            return await self._revise(client, scope)
        if do in ("draw", "read"):
            return self._retrieve(do, scope, await _answered(client.snapshot(scope)))
        return self._report(scope) if do == "report" else self._remove(do, scope)

    def _retrieve(self, do: str, scope: str, version: int) -> int:
        if do == "read":
            return self._ledger.ask(do=do, scope=scope, version=version, limit=_READ)
        strategy = self._chance.choice((RetrievalStrategy.EXPLORE, RetrievalStrategy.LATEST_SUCCESS))
        keys = [self._word() for _ in range(_DRAWN)]
        return self._ledger.ask(do=do, scope=scope, version=version, keys=keys, strategy=strategy)

    def _report(self, scope: str) -> int | None:
        if not (drawn := self._drawn[scope]):
            return None
        uses = drawn.pop(self._chance.randrange(len(drawn)))
        outcomes = [[use_id, self._reward(scope, left_out)] for use_id, left_out in uses]
        return self._ledger.ask(do="report", scope=scope, outcomes=outcomes, first=True)

    def _remove(self, do: str, scope: str) -> int | None:
        if not (rules := self._rules[scope]):
            return None
        return self._ledger.ask(do=do, scope=scope, id=rules.pop(self._chance.randrange(len(rules))))

    def _add(self, scope: str, kind: ReflectionKind) -> int:
        word = self._word()
        text = word if kind is ReflectionKind.DOCUMENT else f"{word} is what this entry says"
        rules = self._rules[scope]
        sources = [self._chance.choice(rules)] if rules and self._chance.random() < 0.2 else []
        return self._ledger.ask(
            do="add", scope=scope, request=f"request {word}", word=word, text=text, kind=kind, sources=sources
        )

    async def _revise(self, client: MemoryClient, scope: str) -> int:
        seen = await _answered(client.get(self._chance.choice(self._documents[scope])))
        word = self._word()
        text = f"{seen.text} {word}"
        return self._ledger.ask(
            do="revise", scope=scope, id=seen.reflection_id, expected=seen.revision, text=text, word=word
        )

    def _word(self) -> str:
        return f"w{self._chance.getrandbits(64):016x}"

    def _reward(self, scope: str, left_out: str) -> float:
        """In the second scope entries harm, so that some are quarantined."""
        return self._chance.choice(_REWARDS) if scope == SCOPES[0] else float(bool(left_out))

    async def _make(self, client: MemoryClient, number: int, *, again: bool = False) -> None:
        """Makes a call that was noted, and notes its answer. Raises Gone."""
        call = self._ledger.calls[number]
        try:
            answer = await _answered(_CALLS[call["do"]](client, call))
        except DomainError as error:
            if call["do"] == "revise" and error.reason is Reason.REVISION_CONFLICT and not again:
                answer = CONFLICT
            elif error.reason in (Reason.REVISION_CONFLICT, Reason.SNAPSHOT_REDACTED):
                self._unsure.add(number)  # it may have been made before another one
                return
            else:
                raise
        self._ledger.answer(number, answer)
        self._remember(call, answer)
        if call["do"] == "report":
            expected = {len(call["outcomes"]) if call["first"] else 0} | ({0} if again else set())
            promise(answer in expected, f"{answer} of {call['outcomes']} counted, not {expected}")
            if call["first"] and self._chance.random() < _REPEATED:
                await self._make(client, self._ledger.ask(**{**call, "first": False}))

    def _remember(self, call: Call, answer: Any) -> None:
        scope = call["scope"]
        if call["do"] == "add":
            documents, rules = self._documents[scope], self._rules[scope]
            (documents if call["kind"] == ReflectionKind.DOCUMENT else rules).append(answer)
        elif call["do"] == "draw" and answer["uses"]:
            self._drawn[scope].append(answer["uses"])


async def _answered(call: Awaitable[T]) -> T:
    """Raises Gone where the service is."""
    try:
        return await call
    except ServiceUnavailable as error:
        raise Gone from error


async def _call_add(client: MemoryClient, call: Call) -> str:
    labels = Labels(kind=ReflectionKind(call["kind"]), source_ids=tuple(call["sources"]))
    return await client.add(call["request"], call["scope"], call["text"], ORIGIN, labels)


async def _call_revise(client: MemoryClient, call: Call) -> int:
    return await client.revise(call["id"], call["word"], call["expected"], text=call["text"])


async def _call_draw(client: MemoryClient, call: Call) -> Any:
    query = ReflectionQuery(
        call["scope"],
        ORIGIN.environment,
        RetrievalStrategy(call["strategy"]),
        _RETRIEVED,
        call["version"],
        kinds=(ReflectionKind.RULE,),
    )
    found = await client.query(query, Trial(tuple(call["keys"]), 0.5))
    uses = [[use.use_id, use.left_out_id] for use in found.uses]
    return {"entries": [one.reflection_id for one in found.reflections], "uses": uses}


async def _call_report(client: MemoryClient, call: Call) -> int:
    return await client.report([UseOutcome(*outcome) for outcome in call["outcomes"]])


async def _call_read(client: MemoryClient, call: Call) -> Any:
    strategy = RetrievalStrategy.LATEST_SUCCESS
    query = ReflectionQuery(call["scope"], ORIGIN.environment, strategy, call["limit"], call["version"])
    found = await client.query(query)
    return {"seen": [[one.reflection_id, one.text, one.revision] for one in found.reflections]}


_CALLS: dict[str, Callable[[MemoryClient, Call], Awaitable[Any]]] = {
    "add": _call_add,
    "revise": _call_revise,
    "draw": _call_draw,
    "report": _call_report,
    "read": _call_read,
    "delete": lambda client, call: client.delete(call["id"]),
    "erase": lambda client, call: client.erase(call["id"]),
}


async def write_under_kills(
    server: ServiceProcess, check: Callable[[Ledger], Awaitable[Counter[str]]], *, kills: int, seed: int
) -> dict[str, Any]:
    """Kills the running service so many times, each time at a random moment, and checks its store after each. Returns
    what happened, in numbers. Raises BrokenPromise, at times in a group."""
    chance = random.Random(seed)
    ledger = Ledger()
    writers = Writers(ledger, chance)
    starting = unanswered = 0
    found: Counter[str] = Counter()
    for _ in range(kills):
        await _kill_amid(server, writers, ledger, chance)
        unanswered += len(ledger.open)
        found = await check(ledger)
        if chance.random() < _STARTING:
            starting += await _kill_while_it_starts(server, chance)
            found = await check(ledger)
        await asyncio.to_thread(server.start)
    await _finish(server, writers)
    server.kill()
    found = await check(ledger)
    counts = {"kills": kills, "kills_at_start": starting, "unanswered": unanswered}
    return {**counts, "answered": ledger.answered, "found": found}


async def _kill_amid(server: ServiceProcess, writers: Writers, ledger: Ledger, chance: random.Random) -> None:
    client = MemoryClient(Endpoint(server.address, outage_seconds=0))
    due = len(ledger.answers) + chance.randrange(_ANSWERS)
    writing = asyncio.create_task(writers.write(client))
    try:
        while len(ledger.answers) < due and not writing.done():  # noqa: ASYNC110 - counted by several tasks
            await asyncio.sleep(0.002)
        await asyncio.sleep(chance.uniform(0, 0.02))
        server.kill()
        await writing
    finally:
        await client.close()


async def _kill_while_it_starts(server: ServiceProcess, chance: random.Random) -> bool:
    """False where it was faster."""
    starting = asyncio.create_task(asyncio.to_thread(server.start))
    await asyncio.sleep(chance.uniform(0, _START_SECONDS))
    if server.process is not None:
        server.process.kill()
    try:
        await starting
    except ProcessFailed:
        return True
    finally:
        server.kill()
    return False


async def _finish(server: ServiceProcess, writers: Writers) -> None:
    """Has the calls without an answer answered."""
    client = MemoryClient(Endpoint(server.address))
    await writers.write(client, 0)
    await client.close()


async def write_and_lose_power(
    folder: Path, *, calls: int, losses: int, seed: int, synced: bool = True
) -> dict[str, Any]:
    """Records so many answered calls, and checks the store after so many losses of power amid them. Without `synced`
    it is as if the log had never been synced. Returns what happened, in numbers. Raises BrokenPromise, and
    CannotRecord."""
    data, disk, trace = folder / DATA, folder / "disk", folder / "trace"
    data.mkdir(parents=True)
    module = ["-m", "mulligan.testing.memory_writers"]
    command = [sys.executable, *module, f"{folder}", "--calls", f"{calls}", "--seed", f"{seed}"]
    await asyncio.to_thread(power_loss.record, command, trace)
    happened = list(power_loss.events(trace, data))
    if not synced:
        log = f"{data / DATABASE}-wal"
        happened = [one for one in happened if one != power_loss.Synced(log)]
    trace.unlink()
    found: Counter[str] = Counter()
    unanswered = 0
    for loss in power_loss.losses(happened, data / LEDGER, losses, random.Random(seed)):
        disk.mkdir()
        for name, content in loss.files.items():
            (disk / name).write_bytes(content)
        ledger = Ledger.read(loss.notes)
        unanswered += len(ledger.open)
        found = await check_sqlite(disk / DATABASE, ledger)
        shutil.rmtree(disk)
    kinds = Counter(type(event).__name__.lower() for event in happened)
    return {"losses": losses, "events": kinds, "unanswered": unanswered, "answered": ledger.answered, "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    services = ServiceProcesses(arguments.folder)
    try:
        data = arguments.folder / DATA
        server = services.start("memory", database=data / DATABASE)
        ledger = Ledger(data / LEDGER)

        async def write() -> None:
            client = MemoryClient(Endpoint(server.address))
            await Writers(ledger, random.Random(arguments.seed)).write(client, arguments.calls)
            await client.close()

        asyncio.run(write())
    finally:
        services.end()


if __name__ == "__main__":
    main()
