"""What traces cost: `python -m benchmarks.tracing`.

The same work without traces, with all traces recorded, and with a tenth of them. Client and server record, as trainer
and services do in a run, and send what they record to a collector in a process of its own on this machine, which counts
its bytes.

- env: 64 episodes at a time, in steps that nobody thinks about. So nearly all of the time is that of calls: the worst
  case. Counted are steps.
- policy: 32 conversations at a time with the embedded model. Counted are completions.

Measurements alternate, and the ratios are of medians: of what is done per second, and of CPU time for each, of client
and server together. Only the second is worth something on a machine that does other things, too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import grpc

from benchmarks.common import alternate, median, print_result, print_table
from mulligan.common.channel import Endpoint
from mulligan.common.config import ServiceSettings
from mulligan.common.inference import CallOptions, Message, Role, SamplingParams
from mulligan.common.tracing import root_span, span, stop_tracing
from mulligan.common.types import Split
from mulligan.env.client import EnvClient
from mulligan.policy.client import PolicyClient
from mulligan.testing.processes import ServiceProcess, ServiceProcesses

ENVIRONMENT = "frozenlake-3x3"
EPISODES = 64
CONVERSATIONS = 32
TURNS = 8
RATIOS: dict[str, float | None] = {"off": None, "all": 1.0, "tenth": 0.1}
SAMPLING = SamplingParams(temperature=1.0, max_tokens=8)
ACTIONS = ("Left", "Down", "Right", "Up")


class Measured(NamedTuple):
    per_second: float
    microseconds: float  # of CPU time, for each


class TracedClient(ServiceSettings):
    service = "benchmark"


@contextmanager
def traced(collector: str, ratio: float | None) -> Iterator[None]:
    """This process records its part, too, if there is a ratio."""
    if ratio is None:
        yield
        return
    from mulligan.common.otlp import export_traces

    export_traces(TracedClient(otlp_endpoint=collector, trace_ratio=ratio))
    try:
        yield
    finally:
        stop_tracing()


async def steps(client: EnvClient, tasks: list[str], seconds: float) -> int:
    """How many are played in rounds of `EPISODES` episodes; a round is a step of a run."""
    played = 0

    async def play(number: int, place: int) -> None:
        nonlocal played
        with span("experience", experience_id=f"round-{number}-{place}"):
            task = tasks[place % len(tasks)]
            episode = await client.start(ENVIRONMENT, task, f"{time.monotonic_ns()}-{place}")
            for turn in range(TURNS):
                step = await episode.step(f"<answer>{ACTIONS[(place + turn) % len(ACTIONS)]}</answer>")
                played += 1
                if step.done:
                    return
            await episode.end()

    start = time.perf_counter()
    number = 0
    while time.perf_counter() - start < seconds:
        root = root_span("run.step", run_id="benchmark", step=number)
        with root:
            await asyncio.gather(*(play(number, place) for place in range(EPISODES)))
        root.end()
        number += 1
    return played


async def completions(client: PolicyClient, seconds: float) -> int:
    answered = 0

    async def ask(number: int, place: int) -> None:
        nonlocal answered
        with span("experience", experience_id=f"round-{number}-{place}"):
            prompt = (Message(Role.USER, f"Round {number}, place {place}."),)
            await client.generate(prompt, SAMPLING, CallOptions(request_id=f"{number}-{place}"))
            answered += 1

    start = time.perf_counter()
    number = 0
    while time.perf_counter() - start < seconds:
        root = root_span("run.step", run_id="benchmark", step=number)
        with root:
            await asyncio.gather(*(ask(number, place) for place in range(CONVERSATIONS)))
        root.end()
        number += 1
    return answered


async def measure(
    services: ServiceProcesses, collector: str, work: str, seconds: float, rounds: int
) -> dict[str, list[Measured]]:
    """One server for each way, all at once; one of them works at a time."""
    servers = {}
    for name, ratio in RATIOS.items():
        settings: dict[str, Any] = {"log_level": "warning"} | ({"threads": 1} if work == "policy" else {})
        if ratio is not None:
            settings |= {"otlp_endpoint": collector, "trace_ratio": ratio}
        servers[name] = services.start(work, **settings)
    ways: dict[str, Callable[[], Awaitable[Measured]]] = {}
    clients: list[Any] = []
    for name, server in servers.items():
        if work == "env":
            env = EnvClient(Endpoint(server.address))
            tasks = [task.task_id for task in await env.list_tasks(ENVIRONMENT, Split.TRAIN, EPISODES)]
            ways[name] = partial(_traced, collector, RATIOS[name], server, partial(steps, env, tasks, seconds))
            clients.append(env)
        else:
            policy = PolicyClient(Endpoint(server.address))
            ways[name] = partial(_traced, collector, RATIOS[name], server, partial(completions, policy, seconds))
            clients.append(policy)
    await alternate(ways, 1)  # warms up
    found = await alternate(ways, rounds)
    for client in clients:
        await client.close()
    for server in servers.values():
        server.stop()
    return found


async def _traced(
    collector: str, ratio: float | None, server: ServiceProcess, work: Callable[[], Awaitable[int]]
) -> Measured:
    start, cpu = time.perf_counter(), _cpu_seconds(server)
    with traced(collector, ratio):
        done = await work()
        seconds = time.perf_counter() - start  # without the last spans, which are sent now
    return Measured(done / seconds, (_cpu_seconds(server) - cpu) / done * 1e6)


def _cpu_seconds(server: ServiceProcess) -> float:
    """Of this process and the server."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class CountingCollector:
    """Takes spans, and counts their bytes: they are not even parsed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0

    def serve(self) -> None:
        """Prints its port, and after the end of stdin what it counted."""
        method: Any = grpc.unary_unary_rpc_method_handler(self._count)
        name = "opentelemetry.proto.collector.trace.v1.TraceService"
        server = grpc.server(ThreadPoolExecutor(2))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Export": method}),))
        print(server.add_insecure_port("127.0.0.1:0"), flush=True)
        server.start()
        sys.stdin.read()
        server.stop(None)
        print(self._bytes, flush=True)

    def _count(self, request: bytes, _: object) -> bytes:
        with self._lock:
            self._bytes += len(request)
        return b""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracing", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter and fewer measurements")
    parser.add_argument("--collect", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.collect:
        CountingCollector().serve()
        return
    seconds, rounds = (1.0, 3) if given.quick else (3.0, 7)
    command = [sys.executable, "-m", "benchmarks.tracing", "--collect"]
    values: dict[str, dict[str, Measured]] = {}
    with (
        TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as collecting,
    ):
        assert collecting.stdin is not None and collecting.stdout is not None
        collector = f"http://127.0.0.1:{int(collecting.stdout.readline())}"
        services = ServiceProcesses(Path(folder))
        try:
            for work in ("env", "policy"):
                found = asyncio.run(measure(services, collector, work, seconds, rounds))
                values[work] = {name: Measured(*map(median, zip(*each, strict=True))) for name, each in found.items()}
        finally:
            services.end()
        collecting.stdin.close()
        received = int(collecting.stdout.readline())
    report(values, received)


def report(values: Mapping[str, Mapping[str, Measured]], received: int) -> None:
    rows = []
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for work, each in values.items():
        off = each["off"]
        of_work = ratios[work] = {}
        for name, found in each.items():
            rate, cpu = found.per_second / off.per_second, found.microseconds / off.microseconds
            of_work[name] = {"per_second": rate, "cpu": cpu}
            rows.append(
                [work, name, f"{found.microseconds:,.0f}", f"{cpu:.2f}", f"{found.per_second:,.0f}", f"{rate:.2f}"]
            )
    print_table(["work", "traces", "CPU, µs", "of off", "per second", "of off"], rows)
    plain = {work: {name: found._asdict() for name, found in each.items()} for work, each in values.items()}
    print_result("tracing", {"measured": plain, "ratios": ratios, "bytes_received": received})


if __name__ == "__main__":
    main()
