"""Half an hour of work for the four services: memory, open descriptors, threads and processes stay flat.

Small training runs, evaluations, episodes (also of an untrusted environment) and writes to the memory go on all the
time, each as fast as the services answer. Growth is the slope of Theil and Sen (the median of the slopes between all
pairs of samples) times the time that was judged: a few high samples do not change it. The first minutes, in which
caches fill and libraries are loaded, are not judged.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, count
from pathlib import Path
from statistics import median
from typing import Any

from mulligan.cli.local import LocalServices
from mulligan.common.channel import Endpoint
from mulligan.common.reflections import Provenance, ReflectionQuery, RetrievalStrategy
from mulligan.common.tasks import cancel
from mulligan.common.types import Split
from mulligan.env.client import EnvClient
from mulligan.memory.client import MemoryClient
from mulligan.testing.loop import small_run
from mulligan.trainer.client import RunClient
from mulligan.trainer.folder import RunState
from mulligan.trainer.settings import EvaluationSettings

SECONDS = 1800.0
WARM_UP_SECONDS = 420.0
EVERY_SECONDS = 5.0
ENV_CONFIG = """
lease_seconds = 60
max_finished = 512
[environments.frozenlake-3x3]
kind = "frozenlake"
size_min = 3
size_max = 3
[environments.fenced]
kind = "frozenlake"
untrusted = true
"""
LAKES = ("frozenlake-3x3", "fenced")
_SCOPES = 20
_KEPT = 50  # entries of a scope, before the oldest is deleted
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Bound:
    """What may grow: by `least`, or by `share` of the median if that is more."""

    least: float
    share: float

    def holds(self, growth: float, level: float) -> bool:
        return growth <= max(self.least, self.share * level)


BOUNDS = {
    "memory_mib": Bound(8.0, 0.03),
    "descriptors": Bound(2.0, 0.1),  # abandoned episodes have some until they expire
    "threads": Bound(2.0, 0.0),
    "processes": Bound(2.0, 0.1),
}


def slope(seconds: Sequence[float], values: Sequence[float]) -> float:
    """Units per second, as Theil (1950) and Sen (1968) estimate it. Needs two samples at different times."""
    pairs = combinations(zip(seconds, values, strict=True), 2)
    return median((later - earlier) / (then - now) for (now, earlier), (then, later) in pairs if then != now)


@dataclass
class Samples:
    """What a service had, at so many seconds from the start."""

    seconds: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in BOUNDS})

    def take(self, seconds: float, process: int) -> None:
        self.seconds.append(seconds)
        for name, value in usage(process).items():
            self.values[name].append(value)

    def judged(self, warm_up: float) -> dict[str, dict[str, Any]]:
        """Each quantity's level and growth after the warm-up, and whether it is flat."""
        begin = next((n for n, seconds in enumerate(self.seconds) if seconds >= warm_up), len(self.seconds))
        seconds = self.seconds[begin:]
        if len(seconds) < 3:
            raise ValueError(f"{len(seconds)} samples after {warm_up:g} s do not show whether anything grows")
        found = {}
        for name, values in self.values.items():
            late = values[begin:]
            growth = slope(seconds, late) * (seconds[-1] - seconds[0])
            level = median(late)
            found[name] = {
                "first": round(values[0], 1),
                "median": round(level, 1),
                "most": round(max(values), 1),
                "last": round(values[-1], 1),
                "growth": round(growth, 2),
                "flat": BOUNDS[name].holds(growth, level),
            }
        return found


def usage(process: int) -> dict[str, float]:
    """Of a process: memory in MiB, descriptors, threads; and how many processes it started that still run."""
    status = Path(f"/proc/{process}/status").read_text()
    return {
        "memory_mib": int(status.split("VmRSS:")[1].split()[0]) * 1024 / _MIB,
        "descriptors": len(os.listdir(f"/proc/{process}/fd")),
        "threads": int(status.split("Threads:")[1].split()[0]),
        "processes": len(_descendants(process)),
    }


def _descendants(process: int) -> list[int]:
    found: list[int] = []
    for thread in os.listdir(f"/proc/{process}/task"):
        try:
            children = Path(f"/proc/{process}/task/{thread}/children").read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in map(int, children):
            found.append(child)
            try:
                found += _descendants(child)
            except OSError:  # it has ended
                continue
    return found


Work = Callable[[Mapping[str, str], dict[str, int]], Awaitable[None]]


async def play(addresses: Mapping[str, str], done: dict[str, int]) -> None:
    """Episodes, one after the other; one in 51 is not ended, and expires."""
    client = EnvClient(Endpoint(addresses["env"]))
    try:
        for number in count():
            lake = LAKES[number % len(LAKES)]
            (task, *_) = await client.list_tasks(lake, Split.TRAIN, 1)
            episode = await client.start(lake, task.task_id, f"soak-{os.getpid()}-{number}")
            for move in ("Down", "Right") * 2:
                step = await episode.step(f"```{move}```")
                done["steps"] = done.get("steps", 0) + 1
                if step.done:
                    break
            if number % 51:
                await episode.end()
            done["episodes"] = done.get("episodes", 0) + 1
    finally:
        await client.close()


async def remember(addresses: Mapping[str, str], done: dict[str, int]) -> None:
    """Entries are added, retrieved and deleted; no scope gets large."""
    client = MemoryClient(Endpoint(addresses["memory"]))
    kept: dict[str, list[str]] = {}
    try:
        for number in count():
            scope = f"soak-{number % _SCOPES}"
            origin = Provenance("soak", f"soak-{number}", "frozenlake", f"train/{number}", 0, 0.0, 1.0, True)
            text = f"number {number}: the letter {chr(65 + number % 26)} is the player"
            entries = kept.setdefault(scope, [])
            entries.append(await client.add(f"soak-{number}", scope, text, origin))
            query = ReflectionQuery(scope, "frozenlake", RetrievalStrategy.SIMILAR_WORDS, 5, text="which letter?")
            await client.query(query)
            if len(entries) > _KEPT:
                await client.delete(entries.pop(0))
            done["entries"] = done.get("entries", 0) + 1
            await asyncio.sleep(0.2)  # a database of half an hour, not of a year
    finally:
        await client.close()


async def train(addresses: Mapping[str, str], done: dict[str, int]) -> None:
    """Runs of three steps, one after the other, each with an evaluation of its last checkpoint."""
    client = RunClient(Endpoint(addresses["trainer"]))
    evaluation = EvaluationSettings(tasks=4, samples=1)
    try:
        for number in count():
            run_id = f"soak-{number}"
            await client.start(run_id, small_run(steps=3, seed=number))
            async for _ in client.watch(run_id):
                pass
            info = await client.get(run_id)
            assert info.state is RunState.COMPLETED, f"{info.state}: {info.error}"
            done["runs"] = done.get("runs", 0) + 1
            await client.evaluate("frozenlake-3x3", evaluation, run_id=run_id)
            done["evaluations"] = done.get("evaluations", 0) + 1
    finally:
        await client.close()


async def measure(
    processes: Mapping[str, int],
    addresses: Mapping[str, str],
    works: Sequence[Work],
    *,
    seconds: float,
    every: float,
) -> tuple[dict[str, Samples], dict[str, int]]:
    """Samples of each service while the work goes on, and how much of it was done. Raises what the work raises."""
    samples = {name: Samples() for name in processes}
    done: dict[str, int] = {}
    began = time.monotonic()
    tasks = [asyncio.ensure_future(work(addresses, done)) for work in works]
    try:
        while (now := time.monotonic() - began) <= seconds:
            for name, process in processes.items():
                samples[name].take(now, process)
            for task in (await asyncio.wait(tasks, timeout=every))[0]:
                task.result()
    finally:
        for task in tasks:
            await cancel(task)
    return samples, done


async def _soak(folder: Path) -> dict[str, Any]:
    config = folder / "env.toml"
    config.write_text(ENV_CONFIG)
    async with LocalServices(folder / "services", configs={"env": config}) as services:
        processes = services.processes
        samples, done = await measure(
            processes, services.addresses, (play, remember, train), seconds=SECONDS, every=EVERY_SECONDS
        )
        restarted = [name for name, process in services.processes.items() if process != processes[name]]
    judged = {name: one.judged(WARM_UP_SECONDS) for name, one in samples.items()}
    growing = [f"{name}: {what}" for name, found in judged.items() for what, one in found.items() if not one["flat"]]
    return {
        "soaked_seconds": SECONDS,
        "judged_after_seconds": WARM_UP_SECONDS,
        "samples": min(len(one.seconds) for one in samples.values()),
        "done": done,
        "restarted": restarted,
        "growing": growing,
        "services": judged,
    }


def soak(folder: Path) -> dict[str, Any]:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    found = asyncio.run(_soak(folder))
    assert not found["restarted"] and not found["growing"], found
    return found


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {"soak": soak}
