"""Checks of every service: its credential, health and reflection."""

from __future__ import annotations

from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mulligan.common.tokens import bearer
from mulligan.conformance.report import NotApplicable, Suite, Violation, demand
from mulligan.conformance.target import CheckSession, as_demanded


def add_credential(suite: Suite[CheckSession], method: str, request: Any) -> None:
    @suite.check(method, "without the token, and with another, a call is UNAUTHENTICATED BAD_CREDENTIAL")
    async def credential(session: CheckSession) -> None:
        if not session.target.token:
            raise NotApplicable("no token was given: the server seems to have none")
        for metadata in ((), (("authorization", "Bearer of-nothing"),), (("authorization", session.target.token),)):
            answer = await session.attempt(method, request, metadata=metadata)
            as_demanded(answer, request, "UNAUTHENTICATED", "BAD_CREDENTIAL")


def add_roles(suite: Suite[CheckSession], method: str, request: Any) -> None:
    """`request` must do no harm where it is not refused."""

    @suite.check(method, "a reader's token is PERMISSION_DENIED INSUFFICIENT_ROLE")
    async def roles(session: CheckSession) -> None:
        if not session.target.reader_token:
            raise NotApplicable("no token of a reader was given (MULLIGAN_CLI_READER_TOKEN)")
        answer = await session.attempt(method, request, metadata=bearer(session.target.reader_token))
        as_demanded(answer, request, "PERMISSION_DENIED", "INSUFFICIENT_ROLE", "role", "needed_role")


def add_health(suite: Suite[CheckSession]) -> None:
    @suite.check("grpc.health.v1.Health", "where there is a health service, it says that the server serves")
    async def health(session: CheckSession) -> None:
        stub: Any = health_pb2_grpc.HealthStub(cast(Any, session.target.channel))  # its types know synchronous ones
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=session.target.timeout)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise NotApplicable("the server has no health service, which the contract does not ask for") from None
            raise Violation("SERVING, without a credential", f"{error.code().name}: {error.details()}") from None
        demand(answer.status == health_pb2.HealthCheckResponse.SERVING, "SERVING", answer)


def add_reflection(suite: Suite[CheckSession], *services: str) -> None:
    @suite.check("grpc.reflection", "where there is server reflection, it names the services")
    async def reflection(session: CheckSession) -> None:
        try:
            from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
        except ImportError:
            raise NotApplicable("this needs the package grpcio-reflection here") from None
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast(Any, session.target.channel))
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(
            iter([asked]), timeout=session.target.timeout, metadata=session.target.metadata
        )
        found: list[str] = []
        try:
            async for answer in call:
                found = [service.name for service in answer.list_services_response.service]
                break
        except grpc.aio.AioRpcError:
            raise NotApplicable(
                "the server has no reflection for this caller, which the contract does not ask for"
            ) from None
        finally:
            call.cancel()
        missing = [service for service in services if service not in found]
        demand(not missing, f"{', '.join(missing)} among the services", f"{found}")
