"""Runs the environment suite against a server."""

from __future__ import annotations

from collections.abc import Callable

from mulligan.conformance.env import ENVIRONMENT, SERVER, WITHOUT_EPISODES
from mulligan.conformance.env.game import EnvOptions, Game
from mulligan.conformance.report import Report, Result, run_suite
from mulligan.conformance.target import CheckSession, Target, TargetUnreachable
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc

METHODS = ("ListEnvironments", pb.ListEnvironmentsRequest())


def target(address: str, **options: object) -> Target:
    return Target(address, pb_grpc.EnvServiceStub, **options)  # type: ignore[arg-type]  # as Target takes them


async def check(
    target: Target,
    options: EnvOptions,
    *,
    only: str = "",
    environment: str = "",
    on_result: Callable[[Result], None] = lambda result: None,
) -> Report:
    """All checks of the server, then all of each environment, or of one. Of an unavailable one only those that need no
    episode. Raises TargetUnreachable."""
    listed = (await target.connect(*METHODS)).environments
    chosen = [info for info in listed if not environment or info.name == environment]
    if environment and not chosen:
        names = ", ".join(info.name for info in listed)
        raise TargetUnreachable(f"{target.address} offers no environment {environment!r}; there are: {names}")
    report = Report("env", target.address)

    await run_suite(report, SERVER, CheckSession(target), only=only, on_result=on_result)
    for info in chosen:
        suite = WITHOUT_EPISODES if info.unavailable else ENVIRONMENT
        game = Game(CheckSession(target), info, options)
        await run_suite(report, suite, game, subject=info.name, only=only, on_result=on_result)
    return report
