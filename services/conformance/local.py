"""For the author of an environment: serves it in this process, checks it, and explains what is wrong.

A test of an environment asserts `check_environment("my_package.my_environment").conforms`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import grpc
import structlog

from mulligan.common.server import RequestInterceptor
from mulligan.conformance.author import SUITE, WORDS, Made, ids, typed_info
from mulligan.conformance.env import ENVIRONMENT
from mulligan.conformance.env.game import EnvOptions, Game
from mulligan.conformance.env.run import METHODS
from mulligan.conformance.env.run import target as connect
from mulligan.conformance.recorded import Recorded
from mulligan.conformance.replay import make
from mulligan.conformance.report import Check, Report, Result, Verdict, judge
from mulligan.conformance.target import CheckSession
from mulligan.env.base import Environment, EnvironmentInfo, close
from mulligan.env.episodes import EpisodeTable
from mulligan.env.servicer import add_to_server
from mulligan.env.workers import WorkerPool

_THREADS = 8
_HANGING = 64
_MESSAGE_BYTES = 64 * 2**20


def check_environment(
    kind: str,
    settings: Mapping[str, Any] | None = None,
    *,
    actions: int = 300,
    known: Sequence[str] = (),
    seed: int = 0,
    step_seconds: float = 30.0,
    on_result: Callable[[Result], None] = lambda result: None,
) -> Report:
    """Checks the environment: its class, and its episodes over gRPC. Blocks; call it without a running event loop.

    `kind` is as in a server's settings: the name of an environment of the package or of an installed one, or a module.
    `known` are valid actions: they are played among `actions` random and hostile ones. A step that takes longer than
    `step_seconds` counts as hanging. `report.conforms` is True if nothing is wrong; `report.problems()` explains what
    is.

    Raises ValueError if the environment cannot be made: bad settings or missing packages.
    """
    options = EnvOptions(actions, seed, tuple(known))
    environment = make(kind, settings or {})
    info = getattr(environment, "info", None)
    if isinstance(info, EnvironmentInfo) and info.unavailable:
        raise ValueError(f"{kind}: {info.unavailable}")
    try:
        with _without_log():
            return asyncio.run(_check(Made(kind, dict(settings or {}), environment, options), step_seconds, on_result))
    finally:
        close(environment)


async def _check(made: Made, step_seconds: float, on_result: Callable[[Result], None]) -> Report:
    report = Report("environment", made.kind)
    recorded = Recorded(made.environment)

    def add(result: Result, hint: str, *, told: bool = True) -> None:
        raised = recorded.raised[-1] if recorded.raised else ""
        if result.verdict is Verdict.VIOLATED:
            result = replace(result, hint=hint, traceback=raised)
        report.results.append(result)
        if told or result.verdict is Verdict.VIOLATED:
            on_result(result)

    for own in SUITE.checks:
        recorded.raised.clear()
        result = await judge(own, replace(made, environment=recorded))
        add(result, made.hint(own.body))
        if own.body in (typed_info, ids) and result.verdict is Verdict.VIOLATED:
            return report  # it cannot be served
    async with _served(made.info.name, recorded, step_seconds) as address:
        target = connect(address, timeout=step_seconds + 30.0)
        (info,) = (await target.connect(*METHODS)).environments
        game = Game(CheckSession(target), info, made.options)
        for check in ENVIRONMENT.checks:
            recorded.raised.clear()
            words = WORDS.get(check.body)
            shown: Check[Game] = replace(check, call="", title=words.title) if words else check
            result = await judge(shown, game)
            add(result, words.hint if words else "", told=words is not None)
        await target.close()
    return report


@asynccontextmanager
async def _served(name: str, environment: Environment, step_seconds: float) -> AsyncIterator[str]:
    """The address at which this process serves the environment."""
    workers = WorkerPool(_THREADS, step_seconds, _HANGING)
    table = EpisodeTable({name: environment}, workers)
    options = [
        ("grpc.max_send_message_length", _MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ]
    server = grpc.aio.server(interceptors=[RequestInterceptor()], options=options)
    add_to_server(server, table)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(1.0)
        await table.close(5.0)
        workers.close()


@contextmanager
def _without_log() -> Iterator[None]:
    """Switches the log off: the report says the same."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)
