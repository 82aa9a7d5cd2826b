"""mulligan and OpenEnv side by side: the same FrozenLake, tasks, actions and numbers of steps, in alternating rounds.

Each side has a server process on one core and a load process, which plays all sessions, on another. The other side
sleeps meanwhile. mulligan: `mulligan.env` with its defaults, but for a log without a line per request, and one ordinary
`EnvClient`. OpenEnv: `benchmarks/openenv`, with its own asynchronous client, a WebSocket per session; its limit of
sessions is out of the way, uvicorn has uvloop and httptools and does not log requests either, as many files may be open
as the system allows, and 64 connections are opened at a time. uvicorn's other processes would share the one core.

A session plays whole episodes of eight steps. The time is from the first to the last step of all sessions; episodes
begin before and end after it. The wait is that of one step, as its caller sees it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.common import alternate, median
from benchmarks.env.cores import Cores, on
from benchmarks.env.sessions import Load, LoadResult
from benchmarks.openenv import process as openenv
from mulligan.testing.processes import ServiceProcesses

ROOT = Path(__file__).resolve().parents[2]

OURS = "mulligan"
OPENENV = "OpenEnv"
EPISODES = {1: 100, 64: 12, 512: 3, 2048: 1, 4096: 1}  # of each session in a round, by the number of sessions
FEW = 512  # up to so many sessions there are more rounds
WARM_UP = (Load(1, 20), Load(64, 2))


@dataclass(frozen=True)
class SideFigures:
    """Medians over the rounds; `errors` is the sum."""

    steps_per_second: float
    p50_ms: float
    p99_ms: float
    errors: int
    error: str
    rates: tuple[float, ...]


class LoadProcess:
    """`answer` of `sessions.py` in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process

    async def play(self, load: Load) -> LoadResult:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(load)).encode() + b"\n")
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a load process ended with status {await self._process.wait()}")
        return LoadResult(**json.loads(line))


@asynccontextmanager
async def load_process(command: list[str], environment: Mapping[str, str]) -> AsyncIterator[LoadProcess]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe)
    try:
        yield LoadProcess(process)
    finally:
        process.kill()
        await process.wait()


async def compare(folder: Path, cores: Cores, rounds: int, rounds_of_many: int) -> dict[str, dict[int, SideFigures]]:
    """The figures by side and number of sessions. Raises NotInstalled if OpenEnv is missing."""
    services = ServiceProcesses(folder)
    roots = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    try:
        with on(cores.server), openenv.serving() as url:
            address = services.start("env", log_level="warning").address
            ours = [sys.executable, "-m", "benchmarks.env.load", address]
            theirs = [str(openenv.python()), "-m", "benchmarks.openenv.load", url]
            with on(cores.client):
                async with (
                    load_process(ours, {**os.environ, "PYTHONPATH": roots}) as us,
                    load_process(theirs, openenv.environment()) as them,
                ):
                    return await _compare({OURS: us, OPENENV: them}, rounds, rounds_of_many)
    finally:
        services.end()


async def _compare(
    sides: dict[str, LoadProcess], rounds: int, rounds_of_many: int
) -> dict[str, dict[int, SideFigures]]:
    for side in sides.values():
        for load in WARM_UP:
            await side.play(load)
    found: dict[str, dict[int, SideFigures]] = {name: {} for name in sides}
    for sessions, episodes in EPISODES.items():
        load = Load(sessions, episodes)
        plays = {name: partial(side.play, load) for name, side in sides.items()}
        measured = await alternate(plays, rounds if sessions <= FEW else rounds_of_many)
        for name, results in measured.items():
            found[name][sessions] = _figures(results)
        rates = ", ".join(f"{name} {found[name][sessions].steps_per_second:,.0f} steps/s" for name in sides)
        print(f"{sessions} sessions: {rates}", file=sys.stderr, flush=True)
    return found


def _figures(results: list[LoadResult]) -> SideFigures:
    return SideFigures(
        median([result.rate for result in results]),
        median([result.p50_ms for result in results]),
        median([result.p99_ms for result in results]),
        sum(result.errors for result in results),
        next((result.error for result in results if result.error), ""),
        tuple(result.rate for result in results),
    )


def ratio(found: dict[str, dict[int, SideFigures]], sessions: int) -> float | None:
    """mulligan's rate divided by OpenEnv's; None if a side played no step."""
    ours, theirs = (found[name][sessions].steps_per_second for name in (OURS, OPENENV))
    return round(ours / theirs, 2) if ours and theirs else None
