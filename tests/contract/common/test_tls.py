"""TLS as the services speak it: certificates that give roles, and the replacement of all of them under load."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mulligan.common.access import AccessRole
from mulligan.common.certificates import Certificates, RotationStep
from mulligan.common.channel import Connection, Endpoint, is_healthy
from mulligan.common.errors import DomainError, Reason, ServiceUnavailable
from mulligan.common.healthcheck import main as check_health
from mulligan.common.tls import ClientTls
from mulligan.common.types import Split
from mulligan.env.client import EnvClient
from mulligan.env.v1.env_service_pb2 import ListEnvironmentsRequest
from mulligan.env.v1.env_service_pb2_grpc import EnvServiceStub
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from tests.support.certificate import Authority
from tests.support.tokens import token_of, write_tokens
from tests.support.waiting import until

STREAMS = 64
HERE = "127.0.0.1"


async def reason(client: EnvClient) -> Reason | None:
    """Why an episode is not started; None if it is."""
    try:
        (task,) = await client.list_tasks("frozenlake", Split.TEST, 1)
        await (await client.start("frozenlake", task.task_id, f"of-{id(client)}")).end()
    except DomainError as error:
        return error.reason
    finally:
        await client.close()
    return None


async def test_a_certificate_gives_its_role(services: ServiceProcesses, tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    key, certificate = authority.issue("env", HERE)
    server = services.start(
        "env",
        tls_certificate=certificate,
        tls_key=key,
        tls_client_ca=authority.ca,
        tokens_folder=write_tokens(tmp_path, AccessRole.ACTOR),
    )
    nobody = authority.client(None)
    found = {role: await reason(EnvClient(Endpoint(server.address, tls=authority.client(role)))) for role in AccessRole}
    assert found == dict.fromkeys(AccessRole) | {AccessRole.READER: Reason.INSUFFICIENT_ROLE}
    assert await reason(EnvClient(Endpoint(server.address, tls=nobody))) is Reason.BAD_CREDENTIAL
    reader = authority.client(AccessRole.READER, "127.0.0.1")
    for tls in (nobody, reader):  # the greater of the two roles counts
        token = token_of(AccessRole.ACTOR)
        assert await reason(EnvClient(Endpoint(server.address, token=token, tls=tls))) is None
    known = ClientTls(authority.ca)
    for tls in (known, ClientTls(authority.ca, "", *files(stranger.client(AccessRole.ADMIN)))):
        client = EnvClient(Endpoint(server.address, tls=tls, outage_seconds=0.2))
        with pytest.raises(ServiceUnavailable):
            await client.list_environments()
        await client.close()
    flags = ["--tls-ca", str(authority.ca), "--timeout", "20"]
    identified = ["--tls-cert", str(nobody.cert), "--tls-key", str(nobody.key)]
    await asyncio.to_thread(check_health, [server.address, *flags, *identified])
    with pytest.raises(SystemExit, match="does not serve"):
        await asyncio.to_thread(check_health, [server.address, *flags[:2], "--timeout", "1"])
    with pytest.raises(SystemExit, match="cert and key belong together"):
        await asyncio.to_thread(check_health, [server.address, *identified[:2]])


def files(tls: ClientTls) -> tuple[Path | None, Path | None]:
    return tls.cert, tls.key


class Files:
    """The files of `mulligan certs`, for a server and its callers."""

    def __init__(self, folder: Path):
        self.made = Certificates(folder)
        self.made.update()
        self.server = folder / "services" / "env"
        self.client = folder / "clients" / "actor"

    @property
    def tls(self) -> ClientTls:
        return ClientTls(self.client / "ca.crt", "", self.client / "tls.crt", self.client / "tls.key")

    def start(self, services: ServiceProcesses) -> ServiceProcess:
        return services.start(
            "env",
            tls_certificate=self.server / "tls.crt",
            tls_key=self.server / "tls.key",
            tls_client_ca=self.server / "ca.crt",
        )


async def test_all_certificates_are_replaced_while_64_streams_are_open(
    services: ServiceProcesses, tmp_path: Path
) -> None:
    """By the steps of `mulligan certs --rotate`: both authorities are trusted, then the certificates change, then the
    old authority goes. No call fails, no stream ends."""
    pem = Files(tmp_path / "pem")
    shutil.copytree(pem.client, tmp_path / "old")
    old = ClientTls(tmp_path / "old/ca.crt", "", tmp_path / "old/tls.crt", tmp_path / "old/tls.key")
    server = pem.start(services)
    endpoint = Endpoint(server.address, tls=pem.tls, outage_seconds=0)
    connections = [Connection(endpoint) for _ in range(4)]  # each has streams and calls
    calls = [0] * len(connections)
    stop = asyncio.Event()

    async def keep_calling(place: int) -> None:
        stub = EnvServiceStub(connections[place].channel)
        while not stop.is_set():
            await connections[place].call(stub.ListEnvironments, ListEnvironmentsRequest(), timeout=60)
            calls[place] += 1

    async def all_called() -> None:
        """Each caller has begun and ended calls since."""
        before = list(calls)
        assert not any(caller.done() for caller in callers), await asyncio.gather(*callers)
        await until(
            lambda: any(c.done() for c in callers) or all(n > b + 2 for n, b in zip(calls, before, strict=True))
        )
        assert not any(caller.done() for caller in callers), await asyncio.gather(*callers)

    async with AsyncExitStack() as stack:
        for connection in connections:
            stack.push_async_callback(connection.close)
        streams = [await watching(stack, connections[number % len(connections)]) for number in range(STREAMS)]
        callers = [asyncio.create_task(keep_calling(place)) for place in range(len(connections))]
        await all_called()
        for step in RotationStep:
            made = pem.made.update(step)
            assert ("clients/actor" in made) == (step is RotationStep.ISSUE)
            await all_called()
        assert not await is_healthy(server.address, 2.0, old)
        assert await is_healthy(server.address, 20.0, pem.tls)
        stop.set()
        await asyncio.gather(*callers)
        server.terminate()  # it tells those who watch
        states = await asyncio.gather(*(anext(stream) for stream in streams))
        assert {answer.status for answer in states} == {health_pb2.HealthCheckResponse.NOT_SERVING}
    await asyncio.to_thread(server.wait)


async def watching(stack: AsyncExitStack, connection: Connection) -> AsyncIterator[Any]:
    """A stream that stays open; its first answer has come."""
    stub: Any = health_pb2_grpc.HealthStub(connection.channel)
    request = health_pb2.HealthCheckRequest()
    stream = await stack.enter_async_context(connection.stream(stub.Watch, request, timeout=600.0))
    assert (await anext(stream)).status == health_pb2.HealthCheckResponse.SERVING
    return stream


async def test_a_server_with_bad_certificates_does_not_start(services: ServiceProcesses, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    key, _ = authority.issue("env", HERE)
    other_key, other = authority.issue("other", HERE)
    said = r"env: .*other\.pem and .*env\.key are no certificate and its private key"
    with pytest.raises(AssertionError, match=said):
        services.start("env", tls_certificate=other, tls_key=key)
    empty = tmp_path / "empty.pem"
    empty.touch()
    with pytest.raises(AssertionError, match=r"empty\.pem holds no certificate"):
        services.start("env", tls_certificate=other, tls_key=other_key, tls_client_ca=empty)
