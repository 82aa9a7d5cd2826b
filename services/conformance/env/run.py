"""Runs the environment suite against a server."""

from __future__ import annotations

from collections.abc import Callable

from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc

from services.conformance.env import ENVIRONMENT, SERVER, WITHOUT_EPISODES
from services.conformance.env.game import Game, Options
from services.conformance.report import Report, Result, judge
from services.conformance.target import Session, Target, Unreachable

METHODS = ("ListEnvironments", pb.ListEnvironmentsRequest())


def target(address: str, **options: object) -> Target:
    return Target(address, pb_grpc.EnvServiceStub, **options)  # type: ignore[arg-type]  # as Target takes them


async def check(
    target: Target,
    options: Options,
    *,
    only: str = "",
    environment: str = "",
    on_result: Callable[[Result], None] = lambda result: None,
) -> Report:
    """All checks of the server, then all of each environment, or of one. Of an unavailable one only those that need no
    episode. Raises Unreachable."""
    listed = (await target.connect(*METHODS)).environments
    chosen = [info for info in listed if not environment or info.name == environment]
    if environment and not chosen:
        names = ", ".join(info.name for info in listed)
        raise Unreachable(f"{target.address} offers no environment {environment!r}; there are: {names}")
    report = Report("env", target.address)

    def add(result: Result) -> None:
        report.results.append(result)
        on_result(result)

    for server_check in SERVER.checks:
        if server_check.wanted(only):
            session = Session(target)
            add(await judge(server_check, session, clean_up=session.clean_up))
    for info in chosen:
        game = Game(Session(target), info, options)
        for game_check in ENVIRONMENT.checks:
            if game_check.wanted(only) and (not info.unavailable or game_check in WITHOUT_EPISODES.checks):
                add(await judge(game_check, game, info.name, game.session.clean_up))
    return report
