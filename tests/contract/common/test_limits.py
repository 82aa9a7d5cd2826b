"""What strangers and callers can exhaust of a server: memory, streams, connections, its log. `services/common/`:
`callers.py`, `grpc_server.py`, `server.py`."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mulligan.common import server as server_module
from mulligan.common.access import AccessRole
from mulligan.common.callers import CallerLimits
from mulligan.common.channel import Connection, Endpoint, is_healthy
from mulligan.common.config import ServiceSettings
from mulligan.common.errors import DomainError, Reason
from mulligan.common.grpc_server import Server, options
from mulligan.common.server import RequestInterceptor, add_standard_services
from mulligan.common.status import from_rpc_error
from mulligan.common.validation import FieldViolation
from mulligan.env.client import EnvClient
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from tests.support.raw_http2 import PREFACE, RawConnection, literal, message, raw_connection
from tests.support.tokens import token_of, write_tokens
from tests.support.waiting import until, until_async

MEBIBYTE = 2**20
STEP = b"/mulligan.env.v1.EnvService/StepEpisode"
REFLECTION = b"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
CONNECTIONS = 40


@pytest.fixture(scope="module")
def server(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> ServiceProcess:
    """Receives two messages of a caller at once."""
    return shared_services.start(
        "env",
        tokens_folder=write_tokens(tmp_path_factory.mktemp("tokens")),
        max_message_bytes=16 * MEBIBYTE,
        max_caller_bytes=64 * MEBIBYTE,
        max_streams=1_000,
        max_connections=CONNECTIONS,
        receive_seconds=2.0,
    )


def credential(role: AccessRole) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + token_of(role).encode()}


async def half_send(
    connection: RawConnection, metadata: dict[bytes, bytes], calls: int, size: int, call: bytes = STEP
) -> list[int]:
    """Sends the beginnings of messages of this size, as far as the server takes them within a second. Returns the
    numbers of the streams."""
    streams = [connection.begin(call, metadata) for _ in range(calls)]
    sending = [connection.send(stream, message(bytes(size - 1_000), size)) for stream in streams]
    await asyncio.wait([asyncio.create_task(one) for one in sending], timeout=1.0)
    return streams


async def serves(server: ServiceProcess, role: AccessRole = AccessRole.READER) -> None:
    client = EnvClient(Endpoint(server.address, token=token_of(role), outage_seconds=0))
    assert await client.list_environments()
    await client.close()


@pytest.mark.parametrize("call", [STEP, REFLECTION], ids=["a step", "reflection"])
async def test_what_strangers_send_is_not_kept(server: ServiceProcess, call: bytes) -> None:
    """Twelve messages of 15 MiB, of which gRPC would keep 180 MiB."""
    await serves(server)
    before = server.memory
    async with raw_connection(server.address) as connection:
        streams = await half_send(connection, {b"authorization": b"Bearer of-nothing"}, 12, 15 * MEBIBYTE, call)
        assert all(connection.streams[stream].ended.is_set() for stream in streams), "refused before they were read"
        assert server.memory - before < 8 * MEBIBYTE
    await serves(server)


@pytest.mark.parametrize(("call", "at_once"), [(b"Check", 2), (b"Watch", 1)])
async def test_probes_of_strangers_at_many_addresses_are_received_by_turns(
    server: ServiceProcess, call: bytes, at_once: int
) -> None:
    """Half-sent ones of 15 MiB from ten addresses, of which gRPC would keep 150 MiB. Probes of this machine go on."""
    await serves(server)
    before = server.memory
    async with AsyncExitStack() as stack:
        sending = []
        for number in range(10):
            connection = await stack.enter_async_context(raw_connection(server.address, source=f"127.0.1.{number}"))
            path = b"/grpc.health.v1.Health/" + call
            sending.append(asyncio.create_task(half_send(connection, {}, 4, 15 * MEBIBYTE, path)))
        async with asyncio.timeout(5):
            assert await is_healthy(server.address, 5)
        await asyncio.wait(sending)
        assert server.memory - before < (at_once * 15 + 15) * MEBIBYTE
    await serves(server)


async def test_a_caller_that_sends_halves_of_messages_gets_no_further(server: ServiceProcess) -> None:
    """Forty of 15 MiB: two at once are received, for two seconds. Others are served meanwhile."""
    await serves(server)
    before = server.memory
    async with raw_connection(server.address) as connection:
        streams = await half_send(connection, credential(AccessRole.ACTOR), 40, 15 * MEBIBYTE)
        await serves(server, AccessRole.READER)
        assert server.memory - before < 60 * MEBIBYTE
        async with asyncio.timeout(30):
            await connection.streams[streams[0]].ended.wait()
        assert literal(b"grpc-status", b"8") in connection.streams[streams[0]].headers  # RESOURCE_EXHAUSTED
        assert b"the request did not arrive within 2 s" in connection.streams[streams[0]].headers
    await serves(server, AccessRole.ACTOR)


@pytest.mark.parametrize(
    "name", [b"/\xff\xfe", b"/mulligan.env.v1.EnvService/Step\xc3", b"", b"/", b"no-slash", b"/a" * 900]
)
async def test_a_strange_name_of_a_call_ends_no_server(server: ServiceProcess, name: bytes) -> None:
    async with raw_connection(server.address) as connection:
        stream = connection.begin(name)
        await connection.send(stream, message(b""), end=True)
        async with asyncio.timeout(30):
            await connection.streams[stream].ended.wait()
    await serves(server)


async def test_thousands_of_calls_of_a_stranger(server: ServiceProcess) -> None:
    before, log = server.memory, len(server.log)
    async with raw_connection(server.address) as connection:
        for number in range(3_000):
            connection.begin(STEP if number % 2 else b"/no.Such/Call", {b"x": b"\xff", b"y": b"\xfe"})
        await serves(server)
        async with asyncio.timeout(60):
            await asyncio.gather(*(stream.ended.wait() for stream in connection.streams.values()))
        assert connection.max_streams == 1_000
    assert server.memory - before < 100 * MEBIBYTE
    assert len(server.log) - log < 400_000, "lines that strangers cause are left out where there are too many"
    await serves(server)


async def test_connections_have_a_limit_and_callers_go_on(server: ServiceProcess) -> None:
    client = EnvClient(Endpoint(server.address, token=token_of(AccessRole.READER)))
    assert await client.list_environments()
    host, _, port = server.address.rpartition(":")
    opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    try:
        for _ in range(3 * CONNECTIONS):  # half of them never say anything
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(PREFACE if len(opened) % 2 else b"")
            opened.append((reader, writer))
        reading = [asyncio.create_task(_until_closed(reader)) for reader, _ in opened]
        await until(lambda: sum(task.done() for task in reading) >= 2 * CONNECTIONS)
        assert await client.list_environments(), "a connection that is there stays"
    finally:
        for _, writer in opened:
            writer.transport.abort()
        await asyncio.gather(*reading)
    await client.close()

    async def is_served() -> bool:
        try:
            await serves(server)
        except Exception:  # noqa: BLE001 - until the server has noticed that they have gone
            return False
        return True

    await until_async(is_served)


async def test_connections_that_no_caller_uses_leave_room_for_callers(server: ServiceProcess) -> None:
    """A stranger that holds as many as there may be, answers pings, and calls what needs no credential."""
    client = EnvClient(Endpoint(server.address, token=token_of(AccessRole.READER), outage_seconds=0))
    assert await client.list_environments()
    async with AsyncExitStack() as stack:
        for _ in range(CONNECTIONS):
            connection = await stack.enter_async_context(raw_connection(server.address))
            check = connection.begin(b"/grpc.health.v1.Health/Check")
            await connection.send(check, message(b""), end=True)

        async def is_served() -> bool:
            return await is_healthy(server.address, 1)

        await until_async(is_served)
        assert await client.list_environments(), "a connection that is used stays"
        await serves(server)
    await client.close()


async def _until_closed(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(1_000):
            pass
    except ConnectionError:
        pass


class Streaming(pb_grpc.PolicyServiceServicer):
    """A stream without an end, and a call that lasts until it is let go."""

    def __init__(self) -> None:
        self.streaming = 0
        self.generating = 0
        self.generated = 0
        self.peers: set[str] = set()
        self.let_go = asyncio.Event()

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[pb.StreamGenerateResponse]:
        self.streaming += 1
        try:
            while True:
                yield pb.StreamGenerateResponse(text="x" * 1_000)
        finally:
            self.streaming -= 1

    async def Generate(self, request: Any, context: Any) -> pb.GenerateResponse:
        self.generating += 1
        self.generated += 1
        self.peers.add(context.peer())
        try:
            await self.let_go.wait()
        finally:
            self.generating -= 1
        return pb.GenerateResponse()


class Settings(ServiceSettings):
    service = "test"


@asynccontextmanager
async def streaming(idle: float = 600.0, **settings: Any) -> AsyncIterator[tuple[Streaming, str, RequestInterceptor]]:
    servicer = Streaming()  # type: ignore[abstract]  # the other calls are not made
    interceptor = RequestInterceptor(**settings)
    server: Any = Server([interceptor], options(Settings(max_idle_seconds=idle)))
    pb_grpc.add_PolicyServiceServicer_to_server(servicer, server)
    add_standard_services(server, []).serves("")
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield servicer, f"127.0.0.1:{port}", interceptor
    finally:
        await server.stop(None)


async def test_a_connection_without_calls_ends() -> None:
    """Also one that answers pings; a stream is a call for as long as it lasts."""
    async with (
        streaming(idle=0.5) as (servicer, address, _),
        raw_connection(address) as idle,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = pb_grpc.PolicyServiceStub(channel)
        stream = stub.StreamGenerate(pb.StreamGenerateRequest(request=PROMPT))
        await stream.read()
        waiting = stub.Generate(PROMPT)
        async with asyncio.timeout(30):
            await idle.closed.wait()
        await asyncio.sleep(1.5)
        assert not stream.done() and not waiting.done()
        await stream.read()
        stream.cancel()
        servicer.let_go.set()
        await waiting


async def test_clients_do_not_notice_that_an_idle_connection_ended() -> None:
    """They call at about the time when it ends. gRPC ends a call that arrives just then as UNAVAILABLE, and the client
    repeats it."""
    clients, calls, seconds = 20, 20, 0.2
    async with streaming(idle=seconds) as (servicer, address, _):
        servicer.let_go.set()

        async def call(number: int) -> None:
            chance = random.Random(number)
            connection = Connection(Endpoint(address))
            stub = pb_grpc.PolicyServiceStub(connection.channel)
            for _ in range(calls):
                await asyncio.sleep(seconds * chance.uniform(0.98, 2.05))
                await connection.call(stub.Generate, PROMPT, timeout=30)
            await connection.close()

        await asyncio.gather(*(call(number) for number in range(clients)))
        assert servicer.generated >= clients * calls
        assert len(servicer.peers) > 2 * clients, "their connections ended"


PROMPT = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]))


async def refusal(call: Any) -> DomainError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    assert error is not None
    return error


async def test_a_stream_that_nobody_reads_ends() -> None:
    """The handler ends, and with it what the stream holds; the answer says so once it is read."""
    async with (
        streaming(write_seconds=0.3) as (servicer, address, _),
        raw_connection(address, window=10_000) as connection,
    ):
        stream = connection.begin(b"/mulligan.policy.v1.PolicyService/StreamGenerate")
        request = pb.StreamGenerateRequest(request=PROMPT).SerializeToString()
        await connection.send(stream, message(request), end=True)
        await until(lambda: connection.streams[stream].received > 0)
        await until(lambda: servicer.streaming == 0)
        connection.widen(stream, 2**20)
        async with asyncio.timeout(30):
            await connection.streams[stream].ended.wait()
        assert b"the caller did not read the answer for 0.3 s" in connection.streams[stream].headers


async def test_others_are_served_while_a_large_message_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one is checked at once. Of large ones one is checked at a time."""
    go_on = threading.Event()
    checking: list[str] = []

    def slow(request: Any) -> list[FieldViolation]:
        checking.append(threading.current_thread().name)
        if request.ByteSize() > 2**20:
            assert go_on.wait(60)
        return []

    monkeypatch.setattr(server_module, "violations", slow)
    large = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * (2**20 + 1)))
    async with streaming() as (servicer, address, _), grpc.aio.insecure_channel(address) as channel:
        servicer.let_go.set()
        stub = pb_grpc.PolicyServiceStub(channel)
        calls = [stub.Generate(large) for _ in range(2)]
        await until(lambda: bool(checking))
        await stub.Generate(PROMPT)
        assert checking == ["check_0", threading.current_thread().name]
        go_on.set()
        await asyncio.gather(*calls)
    assert servicer.generated == 3 and checking[2:] == ["check_0"]


async def test_a_health_watcher_that_does_not_read_keeps_nobody() -> None:
    class Part:
        serves = True

    part = Part()
    server: Any = Server([RequestInterceptor()], options(Settings()))
    health = add_standard_services(server, [], lambda: {"part": part.serves})
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with raw_connection(address, window=0) as connection, grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service="part")
        health.refresh()
        stream = connection.begin(b"/grpc.health.v1.Health/Watch")
        await connection.send(stream, message(request.SerializeToString()), end=True)
        await until(lambda: bool(connection.streams[stream].headers))
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watched = stub.Watch(request, timeout=30)
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
        part.serves = False
        health.refresh()
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watched.cancel()
    await server.stop(None)


async def test_watches_of_a_stranger_keep_no_health_check_away(server: ServiceProcess) -> None:
    """One that asks for more watches than a server has calls for, and leaves them open."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(300)]
        codes = [asyncio.create_task(watch.code()) for watch in watches]
        await until(lambda: sum(code.done() for code in codes) == 300 - 64)
        assert {code.result() for code in codes if code.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        open_ = [watch for watch, code in zip(watches, codes, strict=True) if not code.done()]
        for watch in open_:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        for _ in range(5):  # as many as it likes, from the same address
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert await is_healthy(server.address, 10)
        open_[0].cancel()

        async def has_room() -> bool:
            try:
                answer = await stub.Watch(health_pb2.HealthCheckRequest()).read()
            except grpc.aio.AioRpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        await until_async(has_room)
        for code in codes:
            code.cancel()
    await serves(server)


@pytest.mark.parametrize("call", ["Check", "Watch"])
async def test_a_large_health_check_is_refused(server: ServiceProcess, call: str) -> None:
    """A watch would keep it for as long as it likes."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        asked = getattr(stub, call)(health_pb2.HealthCheckRequest(service="x" * 5_000))
        error = await refusal(asked.read() if call == "Watch" else asked)
        assert error.reason is Reason.MALFORMED_MESSAGE and "expected at most 4096" in error.message
        unknown = getattr(stub, call)(health_pb2.HealthCheckRequest(service="x" * 1_000))
        if call == "Check":
            assert await unknown.code() is grpc.StatusCode.NOT_FOUND
        else:
            assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_calls_of_one_caller(tmp_path: Path) -> None:
    """Its address, without a credential; health checks count apart."""
    limits = CallerLimits(calls=3)
    async with (
        streaming(limits=limits) as (servicer, address, interceptor),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = pb_grpc.PolicyServiceStub(channel)
        calls = [stub.Generate(PROMPT) for _ in range(3)]
        await until(lambda: servicer.generating == 3)
        error = await refusal(stub.Generate(PROMPT))
        assert error.reason is Reason.CALLER_LIMIT and error.metadata == {"limit": "calls"}
        assert error.retry_after is not None and "3 of its calls run, of 3 at most" in error.message
        health: Any = health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest())
        calls[0].cancel()
        await until(lambda: servicer.generating == 2)
        servicer.let_go.set()
        await asyncio.gather(*calls[1:])
        await stub.Generate(PROMPT)
        await until(lambda: not interceptor.callers)


@pytest.mark.parametrize(
    ("limits", "name"),
    [(CallerLimits(held_bytes=500), "bytes"), (CallerLimits(calls_per_second=0.01), "calls_per_second")],
)
async def test_bytes_and_rate_of_one_caller(limits: CallerLimits, name: str) -> None:
    large = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 1_000))
    async with streaming(limits=limits) as (servicer, address, _), grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.PolicyServiceStub(channel)
        first = stub.Generate(large)
        await until(lambda: servicer.generating == 1)
        error = await refusal(stub.Generate(PROMPT))
        assert error.reason is Reason.CALLER_LIMIT and error.metadata == {"limit": name}
        servicer.let_go.set()
        await first


async def test_thousands_of_calls_of_one_caller_are_within_the_defaults() -> None:
    async with streaming() as (servicer, address, interceptor), grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.PolicyServiceStub(channel)
        calls = [stub.Generate(PROMPT) for _ in range(2_000)]
        await until(lambda: servicer.generating == 2_000)
        servicer.let_go.set()
        await asyncio.gather(*calls)
        await until(lambda: not interceptor.callers)
