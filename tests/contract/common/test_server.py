"""What every service does alike, shown on the environment service: `services/common/{server,channel}.py`."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mulligan.common.access import AccessRole
from mulligan.common.certificates import Certificates
from mulligan.common.channel import Endpoint
from mulligan.common.config import ServiceSettings
from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.healthcheck import main as check_health
from mulligan.common.server import RequestInterceptor, serve
from mulligan.common.status import from_rpc_error
from mulligan.common.tls import ClientTls
from mulligan.common.tokens import KnownTokens, bearer
from mulligan.common.types import Split
from mulligan.env.client import EnvClient
from mulligan.env.envs import DEFAULT_ENVIRONMENTS
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc
from mulligan.policy.v1 import policy_admin_service_pb2 as admin_pb
from mulligan.policy.v1 import policy_admin_service_pb2_grpc as admin_pb_grpc
from mulligan.testing.processes import ProcessFailed, ServiceProcess, ServiceProcesses
from tests.support.tokens import token_of, write_tokens
from tests.support.waiting import until

AWKWARD = {"awkward": {"kind": "tests.support.environments"}}
SERVICE = "mulligan.env.v1.EnvService"


@pytest.fixture(scope="module")
def server(shared_services: ServiceProcesses) -> ServiceProcess:
    """Logs each request, and takes requests of up to 4 KiB."""
    return shared_services.start("env", environments=AWKWARD, max_message_bytes=4096)


@pytest.fixture
async def client(server: ServiceProcess) -> AsyncIterator[EnvClient]:
    client = EnvClient(Endpoint(server.address))
    yield client
    await client.close()


def requests_logged(server: ServiceProcess, **having: object) -> list[dict[str, Any]]:
    """Log lines of requests with these values; waits for them, as they follow the answer."""
    for _ in range(1000):
        lines = [line for line in server.log_lines if line["event"] == "request" and having.items() <= line.items()]
        if lines:
            return lines
        time.sleep(0.02)
    return []


def test_it_is_healthy_as_a_whole_and_by_name(server: ServiceProcess) -> None:
    assert server.is_healthy()
    assert server.is_healthy(SERVICE)
    assert not server.is_healthy("mulligan.no.Such")


def test_reflection_lists_its_services(server: ServiceProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([ask]), timeout=10)
    names = {service.name for service in answer.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


def test_the_address_is_told_whatever_the_log_level(services: ServiceProcesses, tmp_path: Path) -> None:
    """With port 0 nothing else tells it; `services` waits for that line."""
    quiet = services.start("memory", log_level="error", database=tmp_path / "memory.db")
    (line,) = quiet.log_lines
    assert (line["event"], line["address"]) == ("serving", quiet.address)


async def test_each_request_is_one_line_of_json(server: ServiceProcess, client: EnvClient) -> None:
    await client.start("awkward", "good", "logged-episode")
    (line,) = requests_logged(server, episode_id="logged-episode")
    assert (line["method"], line["status"], line["level"]) == ("StartEpisode", "OK", "info")
    assert line["milliseconds"] > 0
    with pytest.raises(DomainError):
        await client.start("awkward", "no-such-task", "failed-episode")
    (line,) = requests_logged(server, episode_id="failed-episode")
    assert (line["status"], line["reason"], line["level"]) == ("NOT_FOUND", "UNKNOWN_TASK", "info")


async def test_a_fault_of_ours_is_internal_and_logged_with_its_trace(server: ServiceProcess, client: EnvClient) -> None:
    """The test environment cannot list its test tasks: no declared error covers that."""
    said = r"ListTasks at .* failed: INTERNAL: RuntimeError, incident ([0-9a-f]{8}): the server's log has it"
    with pytest.raises(CallFailed, match=said) as caught:
        await client.list_tasks("awkward", Split.TEST, 1)
    assert "the list is torn" not in str(caught.value)
    (line,) = requests_logged(server, method="ListTasks", status="INTERNAL")
    assert line["level"] == "error" and f"incident {line['incident']}:" in str(caught.value)
    assert "the list is torn" in line["exception"]


async def test_a_bad_field_is_named(client: EnvClient) -> None:
    with pytest.raises(DomainError) as caught:
        await client.start("", "good", "e")
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.metadata == {"field": "environment", "expected": "must be at least 1 characters"}


async def test_an_oversized_message_is_refused_and_harms_nobody(client: EnvClient) -> None:
    large = await client.start("awkward", "good", "large")
    small = await client.start("awkward", "good", "small")
    steps = asyncio.gather(large.step("x" * 5000), small.step("x"), return_exceptions=True)
    failed, fine = await steps
    assert isinstance(failed, CallFailed)
    assert failed.code == "RESOURCE_EXHAUSTED"
    assert not isinstance(fine, BaseException)
    assert fine.observation == "1: x"


async def reflection_status(address: str, token: str) -> grpc.StatusCode:
    """Of a call of reflection with this token."""
    async with grpc.aio.insecure_channel(address) as channel:
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast(Any, channel))
        call = stub.ServerReflectionInfo(iter([ask]), timeout=10, metadata=bearer(token))
        try:
            answers = [answer async for answer in call]
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK if answers else grpc.StatusCode.UNKNOWN


async def test_calls_need_a_token_and_probes_do_not(services: ServiceProcesses, tmp_path: Path) -> None:
    folder = write_tokens(tmp_path)
    guarded = services.start("env", tokens_folder=folder)
    assert guarded.is_healthy(SERVICE)
    for token in (None, "a-token-of-nobody-here", ""):
        client = EnvClient(Endpoint(guarded.address, token=token))
        with pytest.raises(DomainError) as caught:
            await client.list_environments()
        assert caught.value.reason is Reason.BAD_CREDENTIAL
        await client.close()
    assert await reflection_status(guarded.address, "a-token-of-nobody") is grpc.StatusCode.UNAUTHENTICATED
    assert await reflection_status(guarded.address, token_of(AccessRole.READER)) is grpc.StatusCode.OK
    client = EnvClient(Endpoint(guarded.address, token_file=folder / AccessRole.READER))
    assert len(await client.list_environments()) == len(DEFAULT_ENVIRONMENTS)
    with pytest.raises(DomainError, match="StartEpisode needs the role actor; the caller's is reader") as caught:
        await client.start("frozenlake", "test/0", "an-episode")
    assert caught.value.reason is Reason.INSUFFICIENT_ROLE
    assert caught.value.metadata == {"role": "reader", "needed_role": "actor"}
    assert requests_logged(guarded, status="OK")
    assert requests_logged(guarded, status="PERMISSION_DENIED", reason="INSUFFICIENT_ROLE")
    (folder / AccessRole.READER).write_text("the-next-token-of-a-reader\n")  # read again by both
    assert len(await client.list_environments()) == len(DEFAULT_ENVIRONMENTS)
    await client.close()
    assert "token-of" not in guarded.log and "the-next" not in guarded.log


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    """A folder with the certificate of env, its key, and its authority."""
    Certificates(tmp_path).update()
    return tmp_path / "services" / "env"


async def test_it_speaks_tls(services: ServiceProcesses, tls: Path) -> None:
    server = services.start("env", tls_key=tls / "tls.key", tls_certificate=tls / "tls.crt")
    client = EnvClient(Endpoint(server.address, tls=ClientTls(tls / "ca.crt")))
    assert len(await client.list_environments()) == len(DEFAULT_ENVIRONMENTS)
    await client.close()
    stranger = EnvClient(Endpoint(server.address, outage_seconds=0.3))
    with pytest.raises(ServiceUnavailable):
        await stranger.list_environments()
    await stranger.close()


def healthcheck(*arguments: object) -> bool:
    """Whether what the images' health checks run ends with status 0."""
    try:
        check_health([str(argument) for argument in arguments])
    except SystemExit:
        return False
    return True


def test_the_images_health_check(server: ServiceProcess, services: ServiceProcesses, tls: Path) -> None:
    assert healthcheck(server.address)
    assert healthcheck(server.address, "--service", SERVICE)
    assert not healthcheck(server.address, "--service", "mulligan.policy.v1.PolicyService", "--timeout", 1)
    secure = services.start("env", tls_key=tls / "tls.key", tls_certificate=tls / "tls.crt")
    trust = ("--tls-ca", tls / "ca.crt")
    assert not healthcheck(secure.address, "--timeout", 1)
    assert healthcheck(secure.address, *trust)
    assert healthcheck(secure.address, *trust, "--tls-name", "mulligan-env")
    assert not healthcheck(secure.address, *trust, "--tls-name", "mulligan-policy", "--timeout", 1)
    secure.kill()
    assert not healthcheck(secure.address, *trust, "--timeout", 1)


def test_unreadable_tls_files_stop_the_start(services: ServiceProcesses, tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match=r"status 2:\senv: .*missing\.pem"):
        services.start("env", tls_key=tmp_path / "missing.pem", tls_certificate=tmp_path / "missing.pem")


def test_a_taken_port_stops_the_start(services: ServiceProcesses) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ProcessFailed, match=rf"status 2:(\s.*)*env: port: cannot listen on 127\.0\.0\.1:{port}"):
            services.start("env", port=port)


async def test_a_call_without_a_deadline_gets_the_servers(services: ServiceProcesses) -> None:
    awkward = {"awkward": {**AWKWARD["awkward"], "hang_seconds": 30.0}}
    server = services.start("env", environments=awkward, default_deadline_seconds=2.0)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.EnvServiceStub(channel)
        await stub.StartEpisode(pb.StartEpisodeRequest(episode_id="slow", environment="awkward", task_id="hangs"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.StepEpisode(pb.StepEpisodeRequest(episode_id="slow", action="a"))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert requests_logged(server, status="DEADLINE_EXCEEDED")


async def test_sigterm_finishes_what_is_in_flight(services: ServiceProcesses, tmp_path: Path) -> None:
    began = tmp_path / "began"
    awkward = {**AWKWARD["awkward"], "hang_seconds": 1.0, "began": str(began)}
    server = services.start("env", environments={"awkward": awkward})
    client = EnvClient(Endpoint(server.address, outage_seconds=1.0))
    await client.start("awkward", "hangs", "slow")
    idle = await client.start("awkward", "good", "idle")
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = pb_grpc.EnvServiceStub(channel).StepEpisode(pb.StepEpisodeRequest(episode_id="slow", action="a"))
        waiting = asyncio.ensure_future(call)
        await until(began.exists)
        server.terminate()
        assert (await waiting).observation == "1: a"
    assert await asyncio.to_thread(server.wait) == 0
    events = [line["event"] for line in server.log_lines]
    assert events[events.index("draining") :] == ["draining", "request", "stopped"]
    with pytest.raises(ServiceUnavailable, match=server.address):
        await idle.step("a")
    await client.close()


async def test_a_call_that_a_stopping_server_gives_up_is_made_again(services: ServiceProcesses, tmp_path: Path) -> None:
    began = tmp_path / "began"
    awkward = {**AWKWARD["awkward"], "began": str(began)}
    server = services.start("env", environments={"awkward": awkward}, drain_seconds=0)
    client = EnvClient(Endpoint(server.address))
    episode = await client.start("awkward", "hangs", "given-up")
    step = asyncio.create_task(episode.step("a"))
    await until(began.exists)
    await asyncio.to_thread(server.stop)
    await asyncio.to_thread(server.start)
    with pytest.raises(DomainError) as caught:
        await step
    assert caught.value.reason is Reason.UNKNOWN_EPISODE  # what the new server says
    await client.close()


async def test_an_endpoint_that_is_down_is_named_and_waited_for(services: ServiceProcesses) -> None:
    server = services.start("env", environments=AWKWARD)
    outages: list[str] = []
    patient = EnvClient(Endpoint(server.address), on_outage=outages.append)
    hasty = EnvClient(Endpoint(server.address, outage_seconds=0.2))
    assert len(await patient.list_environments()) == 1
    server.kill()
    with pytest.raises(ServiceUnavailable, match=rf"{server.address} was unreachable for"):
        await hasty.list_environments()
    waiting = [asyncio.create_task(patient.list_environments()) for _ in range(20)]
    await until(lambda: bool(outages))
    server.restart()
    assert [len(found) for found in await asyncio.gather(*waiting)] == [1] * 20
    waited, again = outages  # not one per call
    assert waited.startswith(f"waiting for {server.address}: ") and patient.waiting_for == ""
    assert again.startswith(f"{server.address} answers again, after ")
    await patient.close()
    await hasty.close()


async def test_a_deadline_ends_a_call(server: ServiceProcess) -> None:
    client = EnvClient(Endpoint(server.address))
    hasty = EnvClient(Endpoint(server.address), timeout=0.1)
    episode = await client.start("awkward", "hangs", "deadline")
    with pytest.raises(CallFailed) as caught:
        await hasty.step(episode.episode_id, 0, "a")
    assert caught.value.timed_out
    assert (await episode.step("a")).observation == "1: a"  # the same step: played once
    await hasty.close()
    await client.close()


class Collecting(admin_pb_grpc.PolicyAdminServiceServicer):
    """Its one call streams requests: it answers how many bytes came."""

    def __init__(self) -> None:
        self.read = 0
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()

    async def UploadWeights(
        self, requests: AsyncIterator[admin_pb.UploadWeightsRequest], context: Any
    ) -> admin_pb.UploadWeightsResponse:
        try:
            async for request in requests:
                self.read += 1
                self.begun.set()
                if request.chunk == b"refuse":
                    raise DomainError(Reason.UPLOAD_TOO_LARGE, "no room", room_bytes=3)
                if request.chunk == b"break":
                    raise RuntimeError("broken")
        finally:
            self.ended.set()
        return admin_pb.UploadWeightsResponse(uri=str(self.read))


HEADER = admin_pb.UploadWeightsRequest(
    header=admin_pb.UploadWeightsRequest.Header(kind=admin_pb.WEIGHTS_KIND_FULL, size_bytes=1, sha256="0" * 64)
)


def chunk(content: bytes) -> admin_pb.UploadWeightsRequest:
    return admin_pb.UploadWeightsRequest(chunk=content)


@asynccontextmanager
async def collecting(folder: Path, **settings: Any) -> AsyncIterator[tuple[Collecting, grpc.aio.Channel]]:
    servicer = Collecting()  # type: ignore[abstract]  # the other calls are not made
    tokens = KnownTokens(write_tokens(folder, AccessRole.TRAINER))
    server = grpc.aio.server(interceptors=[RequestInterceptor(tokens, **settings)])
    admin_pb_grpc.add_PolicyAdminServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield servicer, channel
    await server.stop(None)


async def upload(
    channel: grpc.aio.Channel, *requests: admin_pb.UploadWeightsRequest, token: str = token_of(AccessRole.TRAINER)
) -> str:
    stub = admin_pb_grpc.PolicyAdminServiceStub(channel)
    call = stub.UploadWeights(iter(requests), metadata=bearer(token))
    return str((await call).uri)


async def upload_fails(channel: grpc.aio.Channel, *requests: Any, **options: str) -> DomainError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await upload(channel, *requests, **options)
    error = from_rpc_error(caught.value)
    assert error is not None
    return error


async def test_a_call_that_streams_its_requests_goes_through_all_that_others_do(tmp_path: Path) -> None:
    async with collecting(tmp_path) as (servicer, channel):
        assert await upload(channel, HEADER, chunk(b"a"), chunk(b"b")) == "3"
        servicer.read = 0
        assert (await upload_fails(channel, HEADER, token="wrong")).reason is Reason.BAD_CREDENTIAL
        assert servicer.read == 0, "nothing is read of a stranger"
        error = await upload_fails(channel, HEADER, chunk(b"a"), admin_pb.UploadWeightsRequest(), chunk(b"b"))
        assert error.reason is Reason.INVALID_FIELD and error.metadata["field"] == "part"
        assert servicer.read == 2, "each message is checked before it is seen"
        error = await upload_fails(channel, HEADER, chunk(b"refuse"))
        assert error.reason is Reason.UPLOAD_TOO_LARGE and error.metadata == {"room_bytes": "3"}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await upload(channel, HEADER, chunk(b"break"))
        assert caught.value.code() is grpc.StatusCode.INTERNAL and from_rpc_error(caught.value) is None


async def test_a_stream_of_requests_has_a_deadline_and_may_break_off(tmp_path: Path) -> None:
    async with collecting(tmp_path, default_deadline=0.2) as (servicer, channel):

        async def endless() -> AsyncIterator[admin_pb.UploadWeightsRequest]:
            yield HEADER
            await asyncio.sleep(3600)

        stub = admin_pb_grpc.PolicyAdminServiceStub(channel)
        metadata = bearer(token_of(AccessRole.TRAINER))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.UploadWeights(endless(), metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await servicer.ended.wait()
        servicer.begun.clear()
        servicer.ended.clear()
        call = stub.UploadWeights(endless(), metadata=metadata, timeout=3600)
        await servicer.begun.wait()
        call.cancel()
        await servicer.ended.wait()


async def test_parts_of_a_service_have_a_health_of_their_own() -> None:
    parts = {"test.Service": True, "test.Service/part": True}
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    class Settings(ServiceSettings):
        service = "test"

    async def begin(address: str) -> None:
        started.set_result(address)

    serving = asyncio.create_task(
        serve(Settings(), lambda _: [], health_of_parts=lambda: dict(parts), on_started=begin)
    )
    async with grpc.aio.insecure_channel(await started) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)

        async def status(name: str) -> str:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

        assert [await status(name) for name in ("", *parts)] == ["SERVING"] * 3
        watched = stub.Watch(health_pb2.HealthCheckRequest(service="test.Service/part"))
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
        parts["test.Service/part"] = False
        assert [await status(name) for name in ("", *parts)] == ["SERVING", "SERVING", "NOT_SERVING"]
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        parts["test.Service/part"] = True
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING  # though nobody asks
        del parts["test.Service/part"]
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            await status("test.Service/part")
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watched.cancel()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
