"""Whatever bytes arrive at any call of the four services, the answer is one that the contract has, and the server
serves on, without more memory or a longer log than its calls explain. Calls are found by descriptor.

MULLIGAN_TEST_BYTES sets how many requests each call gets (100 by default), and MULLIGAN_TEST_FUZZ_SECONDS how long each
service gets messages that hypothesis makes, and then half as long torn HTTP/2 (2 by default)."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, cast

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from mulligan.common.errors import Reason
from mulligan.common.logs import LINE_LIMIT
from mulligan.common.server import RequestInterceptor
from mulligan.common.status import from_rpc_error
from mulligan.env.v1 import env_service_pb2, env_service_pb2_grpc
from mulligan.memory.v1 import memory_service_pb2
from mulligan.policy.v1 import policy_admin_service_pb2, policy_service_pb2
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from mulligan.trainer.v1 import learner_service_pb2, run_service_pb2
from tests.support.any_message import any_message
from tests.support.mutations import Mutations
from tests.support.raw_http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    SETTINGS,
    call_headers,
    frame,
    header_block,
    message,
)

REQUESTS = int(os.environ.get("MULLIGAN_TEST_BYTES", "100"))
FUZZ_SECONDS = float(os.environ.get("MULLIGAN_TEST_FUZZ_SECONDS", "2"))
CALL_SECONDS = 60.0
LOG_OF_A_CALL = 2_000  # characters at most, on average
MEMORY = 150 * 2**20  # bytes that a service may need more after many calls
OF_THE_CONTRACT = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "OUT_OF_RANGE",
    "RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
}
WITHOUT_REASON = {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
CONTRACTS = {
    "env": [env_service_pb2],
    "policy": [policy_service_pb2, policy_admin_service_pb2],
    "memory": [memory_service_pb2],
    "trainer": [run_service_pb2, learner_service_pb2],
}
PROBES = [health_pb2, reflection_pb2]
PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "environment": ("frozenlake-3x3",),
    "task_id": ("train/00000", "train/00001"),
    "episode_id": ("episode-0", "episode-1"),
    "new_episode_id": ("episode-2",),
    "step_index": (0, 1),
    "policy": ("", "actor"),
    "reflector": ("",),
    "ids": (5, 6, 7),
    "token_ids": (5, 6, 7),
    "tools": (),
    "tool_calls": (),
    "regex": ("[A-D]+",),
    "json_schema": ('{"type": "string"}',),
    "stop_token_ids": (5,),
    "min_policy_version": (0,),
    "seconds": (0, 1),
    "nanos": (0, 1),
    "role": (1, 2),
    "adapter": ("",),
    "temperature": (1.0,),
    "priority": (0,),
    "canary": (),
    "dtype": ("float32",),
    "lora": (),
    "model": ("no-such-model",),
    "source": ("embedded",),
    "max_tokens": (1, 4),
    "n": (1, 2),
    "page_token": ("",),
    "learner_id": ("learner",),
    "owner": ("owner",),
    "name": ("frozenlake-3x3", "checkpoint"),
    "run_id": ("run-0", "run-1"),
    "scope": ("scope",),
    "request_id": ("request-0", "request-1"),
    "sha256": ("0" * 64,),
    "size_bytes": (1, 16, 2**62),
    "uri": ("upload:///" + "0" * 32, "file:///tmp/none.safetensors"),
    "parameters": ('{"type": "object"}',),
    "adapter_config": (b"{}",),
}
# A run or an evaluation that takes place would last longer than the test.
TRAINER = PLAUSIBLE | {"environment": ("no-such-environment",)}


@pytest.fixture(scope="module")
def servers(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServiceProcess]:
    folder = tmp_path_factory.mktemp("servers")
    nowhere = {f"{name}_address": "127.0.0.1:1" for name in ("env", "policy", "memory")}
    chosen: dict[str, dict[str, Any]] = {
        "env": {},
        "policy": {"weights_folder": folder, "threads": 1},
        "memory": {"database": folder / "memory.sqlite"},
        "trainer": {
            "runs_folder": folder / "runs",
            "checkpoint_folder": folder / "checkpoints",
            "weights_folder": folder / "weights",
            "threads": 1,
            "outage_seconds": 0.1,
            **nowhere,
        },
    }
    offline = {"HF_HUB_OFFLINE": "1"}
    with ThreadPoolExecutor() as pool:  # all at once: importing torch takes seconds
        started = {
            name: pool.submit(partial(shared_services.start, name, environment=offline, **values))
            for name, values in chosen.items()
        }
    return {name: process.result() for name, process in started.items()}


@dataclass(frozen=True)
class Answer:
    code: str
    reason: str
    message: str


def methods(module: Any) -> Iterator[MethodDescriptor]:
    for service in module.DESCRIPTOR.services_by_name.values():
        yield from service.methods


def calls_of(name: str) -> list[MethodDescriptor]:
    return [method for module in [*CONTRACTS[name], *PROBES] for method in methods(module)]


def send(channel: grpc.Channel, method: MethodDescriptor, requests: list[bytes]) -> Answer:
    """The first answer of a stream is enough. (Not grpc.aio: it says INTERNAL of itself when the server ends a call to
    which it still writes.)"""
    path = f"/{method.containing_service.full_name}/{method.name}"
    read = message_factory.GetMessageClass(method.output_type).FromString
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    call = getattr(channel, kind)(path, request_serializer=None, response_deserializer=read)
    try:
        answers = call(iter(requests) if method.client_streaming else requests[0], timeout=CALL_SECONDS)
        if method.server_streaming:
            next(answers, None)
            answers.cancel()
    except grpc.RpcError as error:
        found = from_rpc_error(cast(Any, error))  # it has what an AioRpcError has
        return Answer(error.code().name, found.reason if found else "", error.details() or "")
    return Answer("OK", "", "")


def readable(method: MethodDescriptor, content: bytes) -> bool:
    try:
        message_factory.GetMessageClass(method.input_type).FromString(content)
    except DecodeError:
        return False
    return True


def check(method: MethodDescriptor, answer: Answer, requests: list[bytes]) -> None:
    """Raises AssertionError for an answer that the contract does not have."""
    told = f"{method.full_name}: {answer}, for {[request[:200] for request in requests]}"
    assert answer.code in OF_THE_CONTRACT, told
    is_probe = not method.full_name.startswith("mulligan.")
    assert answer.code in WITHOUT_REASON or answer.reason or is_probe, told
    assert len(answer.message.encode()) < 4_000, told
    if not readable(method, requests[0]):
        assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", Reason.MALFORMED_MESSAGE), told


def send_and_check(channel: grpc.Channel, method: MethodDescriptor, requests: list[bytes]) -> str:
    answer = send(channel, method, requests)
    check(method, answer, requests)
    if method.name == "ReleaseMemory":  # otherwise calls wait for it
        resume = method.containing_service.methods_by_name["ResumeMemory"]
        send(channel, resume, [requests[0]] if readable(method, requests[0]) else [b""])
    return answer.code


def strange(address: str, method: MethodDescriptor, plausible: dict[str, tuple[Any, ...]]) -> Counter[str]:
    """Sends the requests of one call; how often each status came."""
    mutations = Mutations(method.full_name, plausible)
    seen: Counter[str] = Counter()
    with grpc.insecure_channel(address) as channel:
        for number in range(REQUESTS):
            length = 1 + number % 4 if method.client_streaming else 1
            requests = [mutations.serialized(method.input_type) for _ in range(length)]
            seen[send_and_check(channel, method, requests)] += 1
    return seen


def fuzz(
    address: str, found: list[MethodDescriptor], plausible: dict[str, tuple[Any, ...]], seconds: float
) -> Counter[str]:
    """Sends messages that hypothesis makes, to all calls in turn, until the time is over. The first answer that the
    contract does not have is raised with the smallest message that gets it. How often each status came."""
    seen: Counter[str] = Counter()
    end = time.monotonic() + seconds
    with grpc.insecure_channel(address) as channel:
        for number in count():
            for method in found:
                fuzz_once(channel, method, plausible, number, seen)
            if time.monotonic() > end:
                break
    return seen


def fuzz_once(
    channel: grpc.Channel,
    method: MethodDescriptor,
    plausible: dict[str, tuple[Any, ...]],
    number: int,
    seen: Counter[str],
) -> None:
    most = 3 if method.client_streaming else 1

    @seed(number)
    @settings(max_examples=5, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(any_message(method.input_type, plausible), min_size=1, max_size=most))
    def send_all(messages: list[Message]) -> None:
        seen[send_and_check(channel, method, [one.SerializeToString() for one in messages])] += 1

    send_all()


def assert_sound(server: ServiceProcess, memory: int, log: int, calls: int) -> None:
    """Its memory and its log have grown by no more than these calls explain, and no call broke it."""
    assert server.is_healthy()
    assert server.memory - memory < MEMORY
    assert len(server.log) - log < 200_000 + calls * LOG_OF_A_CALL
    broken = [line for line in server.log_lines if line["event"] == "request" and "exception" in line]
    assert not broken, broken[0]


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_answer_is_one_of_the_contract(servers: dict[str, ServiceProcess], name: str) -> None:
    server = servers[name]
    found = calls_of(name)
    plausible = TRAINER if name == "trainer" else PLAUSIBLE
    with ThreadPoolExecutor(len(found)) as pool:
        seen = list(pool.map(lambda method: strange(server.address, method, plausible), found))
    total = sum(seen, Counter[str]())
    assert total["INVALID_ARGUMENT"] and total["OK"], total
    assert server.is_healthy()
    lines = server.log.splitlines()
    assert max(map(len, lines)) <= LINE_LIMIT
    broken = [line for line in server.log_lines if line["event"] == "request" and "exception" in line]
    assert not broken, broken[0]


@pytest.mark.parametrize("name", CONTRACTS)
def test_messages_from_descriptors(
    servers: dict[str, ServiceProcess], name: str, record_property: Callable[[str, object], None]
) -> None:
    server = servers[name]
    memory, log = server.memory, len(server.log)
    seen = fuzz(server.address, calls_of(name), TRAINER if name == "trainer" else PLAUSIBLE, FUZZ_SECONDS)
    assert seen["OK"] and seen["INVALID_ARGUMENT"], seen
    for measured, value in {"calls": seen.total(), "memory_bytes": server.memory - memory, **seen}.items():
        record_property(measured, value)
    assert_sound(server, memory, log, seen.total())


@pytest.mark.parametrize("name", CONTRACTS)
async def test_torn_http2(
    servers: dict[str, ServiceProcess], name: str, record_property: Callable[[str, object], None]
) -> None:
    server = servers[name]
    chance = random.Random(name)
    memory, log = server.memory, len(server.log)
    end = time.monotonic() + FUZZ_SECONDS / 2
    connections = 0
    while time.monotonic() < end:
        await asyncio.gather(*(torn(server.address, chance, calls_of(name)) for _ in range(10)))
        connections += 10
    record_property("connections", connections)
    record_property("memory_bytes", server.memory - memory)
    assert_sound(server, memory, log, connections)


async def torn(address: str, chance: random.Random, found: list[MethodDescriptor]) -> None:
    """A connection with the frames of a few calls, of which some are damaged, moved or cut."""
    frames = [PREFACE, frame(SETTINGS, 0, 0)]
    for number in range(chance.randrange(1, 4)):
        method = chance.choice(found)
        path = f"/{method.containing_service.full_name}/{method.name}".encode()
        stream = 1 + 2 * number
        content = message(chance.randbytes(chance.choice((0, 3, 100))), chance.choice((None, 0, 2**31, 2**32 - 1)))
        frames.append(frame(HEADERS, END_HEADERS, stream, header_block(call_headers(path))))
        frames.append(frame(DATA, END_STREAM, stream, content))
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(frames))
        damaged = bytearray(frames[place])
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        frames[place] = chance.choice((bytes(damaged), bytes(damaged[: len(damaged) // 2]), chance.randbytes(30)))
    if chance.random() < 0.3:
        chance.shuffle(frames)
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"".join(frames))
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(0.2):
                while await reader.read(1_000):
                    pass
    finally:
        writer.transport.abort()


class Planted(env_service_pb2_grpc.EnvServiceServicer):
    """Fails for one value of one field."""

    async def ListTasks(self, request: Any, context: Any) -> Any:
        if request.page_size == 7:
            raise KeyError("planted")
        return env_service_pb2.ListTasksResponse()


async def test_a_planted_fault_is_found() -> None:
    """As INTERNAL, with the value that shows it."""
    server: Any = grpc.aio.server(interceptors=[RequestInterceptor()])
    env_service_pb2_grpc.add_EnvServiceServicer_to_server(Planted(), server)  # type: ignore[abstract]
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    [method] = [method for method in methods(env_service_pb2) if method.name == "ListTasks"]
    plausible = {"environment": ("a",), "split": (1,), "page_size": (1, 7)}
    with pytest.raises(AssertionError, match=r"code='INTERNAL'.*KeyError, incident"):
        await asyncio.to_thread(fuzz, address, [method], plausible, 60)
    await server.stop(None)


def test_a_long_id_is_cut_in_the_answer_and_in_the_log(servers: dict[str, ServiceProcess]) -> None:
    server = servers["memory"]
    long = "r" * 4_000_000
    [add] = [method for method in methods(memory_service_pb2) if method.name == "AddReflection"]
    [get] = [method for method in methods(memory_service_pb2) if method.name == "GetReflection"]
    before = len(server.log)
    with grpc.insecure_channel(server.address) as channel:
        for method, request in (
            (add, memory_service_pb2.AddReflectionRequest(request_id=long, scope="scope", text="text")),
            (get, memory_service_pb2.GetReflectionRequest(reflection_id=long)),
            (get, memory_service_pb2.GetReflectionRequest(reflection_id="🧊" * 1_000_000)),
        ):
            answer = send(channel, method, [request.SerializeToString()])
            assert answer.code in ("INVALID_ARGUMENT", "NOT_FOUND") and answer.reason, answer
            assert len(answer.message) < 2_000
    assert server.is_healthy()
    assert len(server.log) - before < 10_000


def test_metadata_may_be_long(servers: dict[str, ServiceProcess]) -> None:
    server = servers["memory"]
    with grpc.insecure_channel(server.address) as channel:
        get: Any = channel.unary_unary("/mulligan.memory.v1.MemoryService/GetSnapshot", request_serializer=None)
        for key, value, code in (
            ("x-long", "x" * 7_000, grpc.StatusCode.OK),  # from 8 KiB on, gRPC refuses some, by chance
            ("x-long", "x" * 100_000, grpc.StatusCode.RESOURCE_EXHAUSTED),
            ("x-bytes-bin", bytes(range(256)), grpc.StatusCode.OK),
        ):
            try:
                get(b"\x0a\x05scope", metadata=((key, value),), timeout=CALL_SECONDS)
                found = grpc.StatusCode.OK
            except grpc.RpcError as error:
                found = error.code()
            assert found is code, key
    assert server.is_healthy()


def header(**changes: Any) -> bytes:
    fields: dict[str, Any] = {"kind": 1, "size_bytes": 16, "sha256": "0" * 64} | changes
    sent = policy_admin_service_pb2.UploadWeightsRequest.Header(**fields)
    return policy_admin_service_pb2.UploadWeightsRequest(header=sent).SerializeToString()


def chunk(content: bytes) -> bytes:
    return policy_admin_service_pb2.UploadWeightsRequest(chunk=content).SerializeToString()


SAFETENSORS = (8).to_bytes(8, "little") + b"{      }"


@pytest.mark.parametrize(
    ("requests", "code", "reason"),
    [
        ([], "INVALID_ARGUMENT", "UPLOAD_INCOMPLETE"),
        ([b""], "INVALID_ARGUMENT", "INVALID_FIELD"),
        ([b"\xff"], "INVALID_ARGUMENT", "MALFORMED_MESSAGE"),
        ([chunk(b"a")], "INVALID_ARGUMENT", "UPLOAD_INCOMPLETE"),
        ([header(), b"\xff"], "INVALID_ARGUMENT", "MALFORMED_MESSAGE"),
        ([header(), b""], "INVALID_ARGUMENT", "INVALID_FIELD"),
        ([header(), header()], "INVALID_ARGUMENT", "UPLOAD_INCOMPLETE"),
        ([header(), chunk(SAFETENSORS[:9]), b"\x12\xff\x01"], "INVALID_ARGUMENT", "MALFORMED_MESSAGE"),
        ([header(), chunk(SAFETENSORS)], "FAILED_PRECONDITION", "CHECKSUM_MISMATCH"),
        ([header(), chunk(SAFETENSORS), chunk(b"a")], "INVALID_ARGUMENT", "UPLOAD_INCOMPLETE"),
        ([header(), chunk(SAFETENSORS[:9])], "INVALID_ARGUMENT", "UPLOAD_INCOMPLETE"),
        ([header(), chunk(b"\xff" * 16)], "FAILED_PRECONDITION", "MODEL_MISMATCH"),
        ([header(size_bytes=2**63 - 1)], "RESOURCE_EXHAUSTED", "UPLOAD_TOO_LARGE"),
        ([header(size_bytes=-1)], "INVALID_ARGUMENT", "INVALID_FIELD"),
        ([header(kind=3)], "INVALID_ARGUMENT", "INVALID_FIELD"),
        ([header(kind=99)], "INVALID_ARGUMENT", "INVALID_FIELD"),
        ([header(sha256="../../escape")], "INVALID_ARGUMENT", "INVALID_FIELD"),
        ([header(kind=2, adapter_config=b"\xff")], "INVALID_ARGUMENT", "INVALID_FIELD"),
        ([header(kind=2, adapter_config=b"[" * 200_000)], "INVALID_ARGUMENT", "INVALID_FIELD"),
        ([header(policy="no-such")], "NOT_FOUND", "UNKNOWN_POLICY"),
    ],
)
def test_an_upload_that_is_none(
    servers: dict[str, ServiceProcess], requests: list[bytes], code: str, reason: str
) -> None:
    [upload] = [method for method in methods(policy_admin_service_pb2) if method.name == "UploadWeights"]
    with grpc.insecure_channel(servers["policy"].address) as channel:
        answer = send(channel, upload, requests)
    assert (answer.code, answer.reason) == (code, reason), answer
    assert "exception" not in servers["policy"].log
