"""What happens to the services during a run, chosen by a seed: one trouble after the other, beside the faulty network.

| trouble | what it is |
|---|---|
| kill | SIGKILL, and a new start |
| partition | no call reaches a service for some seconds |
| full disk | the trainer's files may not grow; or the databases of memory or policy have no room |
| clock | a service's clock jumps by up to a day, forth or back (libfaketime) |
| power | the trainer, or the memory, is killed, and what it had not synced is gone |
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from mulligan.testing.judge import disks
from mulligan.testing.judge.cluster import NAMES, STATE, Cluster
from mulligan.testing.power_loss import CannotRecord, recorder

TROUBLES = ("kill", "partition", "full_disk", "clock", "power")
_BYTES = 40_000  # that the run writes to its journal between two troubles, at most
_STUCK_SECONDS = 20.0  # so long it is waited for that
_LOOK_SECONDS = 0.1  # between two looks at the journal
_LASTS = (0.5, 3.0)
_JUMP = 86_400  # seconds


class Nemesis:
    """`victims` are the services that are killed or cut off. `happened` counts the troubles. `lacking` says which
    cannot be made on this machine, and why."""

    def __init__(
        self,
        cluster: Cluster,
        chance: random.Random,
        troubles: Sequence[str] = TROUBLES,
        victims: Sequence[str] = NAMES,
    ):
        self._cluster = cluster
        self._chance = chance
        self._victims = victims
        self.happened: Counter[str] = Counter()
        self.lacking: dict[str, str] = {}
        self.files_lost = 0
        self._traces = 0
        makers: dict[str, Callable[[], Awaitable[None]]] = {
            "kill": self._kill,
            "partition": self._part,
            "full_disk": self._fill,
            "clock": self._move_clock,
            "power": self._lose_power,
        }
        if not cluster.faketime:
            self.lacking["clock"] = "libfaketime is not installed"
        try:
            recorder(cluster.folder / "probe")
        except CannotRecord as error:
            self.lacking["power of the memory, full disks of databases"] = str(error)
        self._traces_calls = len(self.lacking) == ("clock" in self.lacking)
        self._makers = [makers[name] for name in troubles if name not in self.lacking]

    async def rage(self, troubles: int) -> None:
        """Makes so many."""
        for number in range(troubles):
            await self._run_goes_on(self._chance.randrange(1, _BYTES))
            make = self._makers[number % len(self._makers)] if number < len(self._makers) else None
            await (make or self._chance.choice(self._makers))()

    async def _run_goes_on(self, count: int) -> None:
        """Waits until the run has journaled so many bytes more, or cannot."""
        files = self._cluster.folder / "runs"

        def journaled() -> int:
            try:
                return sum(path.stat().st_size for path in files.glob("*/journal/*.msgpack"))
            except FileNotFoundError:  # the trainer has just renamed one
                return 0

        start = await asyncio.to_thread(journaled)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STUCK_SECONDS):
                while await asyncio.to_thread(journaled) < start + count:  # noqa: ASYNC110 - in another process
                    await asyncio.sleep(_LOOK_SECONDS)

    async def _kill(self) -> None:
        victim = self._chance.choice(self._victims)
        self.happened[f"kill {victim}"] += 1
        await _wholly(self._cluster.processes[victim].restart)

    async def _part(self) -> None:
        victim = self._chance.choice(self._victims)
        self.happened[f"partition {victim}"] += 1
        await self._cluster.networks[victim].part(self._lasts())

    async def _fill(self) -> None:
        victim = self._chance.choice(("trainer", "memory", "policy") if self._traces_calls else ("trainer",))
        self.happened[f"full disk {victim}"] += 1
        pid = self._cluster.processes[victim].pid
        if victim == "trainer":
            full: contextlib.AbstractContextManager[None] = disks.files_may_not_grow(pid)
        else:
            full = disks.database_is_full(pid, self._cluster.folder / "tracer.log")
        with full:
            await asyncio.sleep(self._lasts())

    async def _move_clock(self) -> None:
        victim = self._chance.choice(NAMES)
        self.happened[f"clock {victim}"] += 1
        self._cluster.move_clock(victim, self._chance.randint(-_JUMP, _JUMP))

    async def _lose_power(self) -> None:
        if not self._traces_calls or self.happened["power trainer"] <= self.happened["power memory"]:
            self.happened["power trainer"] += 1
            await _wholly(self._lose_power_of_trainer)
        else:
            self.happened["power memory"] += 1
            await self._lose_power_of_memory()

    def _lose_power_of_trainer(self) -> None:
        trainer = self._cluster.processes["trainer"]
        trainer.kill()
        for state in STATE:
            copies, folder = self._cluster.copies(state), self._cluster.folder / state
            self.files_lost += disks.lose_what_is_not_synced(copies, folder)
        trainer.start()

    async def _lose_power_of_memory(self) -> None:
        """Its calls of the system are recorded from a start on."""
        memory = self._cluster.processes["memory"]
        folder = self._cluster.folder / "memory"
        trace = self._next_trace()
        memory.kill()
        before = disks.files_of(folder)
        memory.before = recorder(trace)
        try:
            await _wholly(memory.start)
            await asyncio.sleep(self._lasts())
        finally:
            await _wholly(memory.kill)
            memory.before = ()
        self.files_lost += disks.lose_power_of_database(folder, before, trace, self._chance)
        await _wholly(memory.start)

    def _next_trace(self) -> Path:
        self._traces += 1
        return self._cluster.folder / f"memory-{self._traces}.trace"

    def _lasts(self) -> float:
        return self._chance.uniform(*_LASTS)


async def _wholly(work: Callable[[], None]) -> None:
    """On a thread. Who is cancelled meanwhile waits for its end: no process starts after all were ended."""
    task = asyncio.create_task(asyncio.to_thread(work))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
