"""Runs the memory suite against a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mulligan.conformance.memory import FIRST, MEMORY
from mulligan.conformance.report import Report, Result, run_suite
from mulligan.conformance.target import CheckSession, Target
from mulligan.memory.v1 import memory_service_pb2_grpc as pb_grpc


def target(address: str, **options: Any) -> Target:
    return Target(address, pb_grpc.MemoryServiceStub, **options)


async def check(target: Target, *, only: str = "", on_result: Callable[[Result], None] = lambda result: None) -> Report:
    """Raises TargetUnreachable."""
    await target.connect(*FIRST)
    report = Report("memory", target.address)
    await run_suite(report, MEMORY, CheckSession(target), only=only, on_result=on_result)
    return report
