"""The cost of an untrusted environment: `python -m benchmarks.untrusted [--quick]`.

The same FrozenLake runs on the server's threads, and in processes with limits: one episode at a time, and many at once.
The ordinary client calls a server process on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from benchmarks.common import percentile, print_result, print_table
from mulligan.common.channel import Endpoint
from mulligan.common.types import Split
from mulligan.env.client import EnvClient
from mulligan.testing.processes import ServiceProcesses

ENVIRONMENTS = {"trusted": {"kind": "frozenlake"}, "untrusted": {"kind": "frozenlake", "untrusted": True}}
CONCURRENT = (1, 64)


async def play(client: EnvClient, name: str, tasks: list[str], starts: list[float], steps: list[float]) -> None:
    for task_id in tasks:
        began = time.perf_counter()
        episode = await client.start(name, task_id, uuid4().hex)
        starts.append(time.perf_counter() - began)
        done = False
        while not done:
            began = time.perf_counter()
            done = (await episode.step("```Up```")).done
            steps.append(time.perf_counter() - began)


async def measure(address: str, name: str, concurrent: int, episodes: int) -> dict[str, float]:
    client = EnvClient(Endpoint(address))
    tasks = [task.task_id for task in await client.list_tasks(name, Split.TRAIN, max(episodes // concurrent, 1))]
    starts: list[float] = []
    steps: list[float] = []
    began = time.perf_counter()
    await asyncio.gather(*(play(client, name, tasks, starts, steps) for _ in range(concurrent)))
    seconds = time.perf_counter() - began
    await client.close()
    return {
        "steps_per_second": round(len(steps) / seconds),
        "step_ms_p50": round(percentile(steps, 50) * 1e3, 2),
        "step_ms_p99": round(percentile(steps, 99) * 1e3, 2),
        "start_ms_p50": round(percentile(starts, 50) * 1e3, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the episodes")
    arguments = parser.parse_args()
    rows = []
    result: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        services = ServiceProcesses(Path(folder))
        try:
            server = services.start("env", environments=ENVIRONMENTS)
            for concurrent in CONCURRENT:
                for name in ENVIRONMENTS:
                    found = asyncio.run(measure(server.address, name, concurrent, 64 if arguments.quick else 640))
                    rows.append([name, f"{concurrent}", *(f"{value:,}" for value in found.values())])
                    result |= {f"{name}_{concurrent}_{key}": value for key, value in found.items()}
        finally:
            services.end()
    print_table(["environment", "episodes at once", *(key.replace("_", " ") for key in found)], rows)
    print_result("untrusted", result)


if __name__ == "__main__":
    main()
