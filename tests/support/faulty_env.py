"""Environment servers with a planted violation each: what the conformance suite must notice.

They serve the dice of `dice.py` with our own servicer; a fault changes what comes in or goes out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from mulligan.common.server import RequestInterceptor
from mulligan.env.episodes import EpisodeLimits, EpisodeTable
from mulligan.env.load import load_or_explain
from mulligan.env.servicer import EnvServicer
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc
from mulligan.env.workers import WorkerPool

DICE = {"kind": "tests.support.dice"}


class Faulty(EnvServicer):
    """`title` is that of the check that must notice."""

    title = ""
    table: ClassVar[dict[str, Any]] = DICE
    lease_seconds = 600.0

    def said(self, step: pb.StepEpisodeResponse) -> pb.StepEpisodeResponse:
        """A step's answer, as it leaves the server."""
        return step

    async def StepEpisode(self, request: pb.StepEpisodeRequest, context: Any) -> pb.StepEpisodeResponse:
        return self.said(await super().StepEpisode(request, context))

    async def StepEpisodes(self, request: pb.StepEpisodesRequest, context: Any) -> pb.StepEpisodesResponse:
        answer = await super().StepEpisodes(request, context)
        for item in answer.items:
            if item.HasField("step"):
                item.step.CopyFrom(self.said(item.step))
        return answer

    def told(self, info: pb.EnvironmentInfo) -> None:
        """Changes what an environment says of itself."""

    async def ListEnvironments(self, request: pb.ListEnvironmentsRequest, context: Any) -> pb.ListEnvironmentsResponse:
        answer = await super().ListEnvironments(request, context)
        for info in answer.environments:
            self.told(info)
        return answer


class NoFault(Faulty):
    pass


def kinds(module: str, base: type[Faulty] = Faulty) -> list[type[Faulty]]:
    """All of a module."""
    found = [kind for sub in base.__subclasses__() for kind in (sub, *kinds(module, sub))]
    return [kind for kind in dict.fromkeys(found) if kind.__module__ == module and kind.title]


@asynccontextmanager
async def served(kind: type[Faulty] = NoFault, *, guarded: bool = True, healthy: bool = True) -> AsyncIterator[str]:
    """The address of a server in this process. Without `guarded` it checks no fields, as a careless one would."""
    workers = WorkerPool(4, 30.0, 4)
    environment = load_or_explain("dice", kind.table)
    table = EpisodeTable({"dice": environment}, workers, EpisodeLimits(lease_seconds=kind.lease_seconds))
    server = grpc.aio.server(interceptors=[RequestInterceptor()] if guarded else [])
    pb_grpc.add_EnvServiceServicer_to_server(kind(table), server)
    status = health_pb2.HealthCheckResponse.SERVING if healthy else health_pb2.HealthCheckResponse.NOT_SERVING
    checks = health.aio.HealthServicer()
    await checks.set("", status)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(1.0)
    workers.close()
