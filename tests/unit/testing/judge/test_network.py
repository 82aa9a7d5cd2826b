"""The faulty network between services, and the recorder, over a server that counts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.server import RequestInterceptor
from mulligan.memory.client import MemoryClient
from mulligan.memory.v1 import memory_service_pb2 as pb
from mulligan.memory.v1 import memory_service_pb2_grpc as pb_grpc
from mulligan.testing.judge import history
from mulligan.testing.judge.collector import Collector
from mulligan.testing.judge.network import CallFaults, FaultyCalls
from mulligan.testing.judge.recorder import CallRecorder, recorded, to_file, to_socket

NO_FAULTS = CallFaults(0, 0, 0, 0, 0)


class Counting(pb_grpc.MemoryServiceServicer):
    def __init__(self) -> None:
        self.asked: list[str] = []

    async def GetSnapshot(self, request: pb.GetSnapshotRequest, context: Any) -> pb.GetSnapshotResponse:
        self.asked.append(request.scope)
        if request.scope == "bad":
            raise DomainError(Reason.UNKNOWN_VERSION, "no")
        return pb.GetSnapshotResponse(version=len(self.asked))


@asynccontextmanager
async def behind(faults: CallFaults) -> AsyncIterator[tuple[Counting, FaultyCalls, MemoryClient]]:
    servicer = Counting()  # type: ignore[abstract]  # the other calls are UNIMPLEMENTED
    server = grpc.aio.server(interceptors=[RequestInterceptor()])
    pb_grpc.add_MemoryServiceServicer_to_server(servicer, server)
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    network = FaultyCalls(lambda: target, faults, random.Random(0))
    await network.start()
    client = MemoryClient(Endpoint(network.address, outage_seconds=20))
    try:
        yield servicer, network, client
    finally:
        await client.close()
        await network.stop()
        await server.stop(None)


async def test_a_lost_answer_has_the_call_made_again_and_both_tries_are_recorded(tmp_path: Path) -> None:
    with recorded(CallRecorder(to_file(tmp_path / "history.jsonl"), "client")):
        async with behind(CallFaults(0, 0, 0, 0, 0, lost_once=frozenset({"GetSnapshot"}))) as (server, _, client):
            assert await client.snapshot("scope") == 2
            assert server.asked == ["scope", "scope"]
    lost, answered = history.read(tmp_path)
    assert (lost.code, lost.answer, answered.answer) == ("UNAVAILABLE", None, {"version": 2})
    assert lost.digest == answered.digest and answered.request == {"scope": "scope"}
    assert lost.start < lost.end < answered.start < answered.end and not lost.refused


async def test_every_first_answer_is_lost_in_a_calm_network_too() -> None:
    """So a run that goes on after all troubles repeats such calls for sure."""
    async with behind(CallFaults(0, 1.0, 1.0, 0, 0, lost_once=frozenset({"GetSnapshot"}))) as (server, network, client):
        network.calm = True
        await client.snapshot("scope")
        assert server.asked == ["scope", "scope"] and network.happened == {"lost_answers": 1}


async def test_a_copy_of_a_call_comes_later(tmp_path: Path) -> None:
    async with behind(CallFaults(0, 0, 1.0, 0, 0, late=0.0)) as (server, network, client):
        await client.snapshot("scope")
        async with asyncio.timeout(10):
            while len(server.asked) < 2:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        assert network.happened["late_copies"] == 1


async def test_a_refusal_passes_with_its_reason(tmp_path: Path) -> None:
    with recorded(CallRecorder(to_file(tmp_path / "history.jsonl"), "client")):
        async with behind(NO_FAULTS) as (_, _, client):
            with pytest.raises(DomainError) as caught:
                await client.snapshot("bad")
    assert caught.value.reason is Reason.UNKNOWN_VERSION
    (call,) = history.read(tmp_path)
    assert (call.reason, call.refused, call.ok) == ("UNKNOWN_VERSION", True, False)


async def test_nothing_passes_a_network_that_is_parted() -> None:
    async with behind(NO_FAULTS) as (server, network, client):
        parting = asyncio.create_task(network.part(0.2))
        await asyncio.sleep(0)
        asking = asyncio.create_task(client.snapshot("scope"))
        await asyncio.wait([parting, asking], return_when=asyncio.FIRST_COMPLETED)
        assert parting.done() and not server.asked
        await asking
        assert server.asked and network.happened == {"partitions": 1, "lost_in_partitions": 1}


async def test_a_partition_lasts_until_a_call_has_met_it() -> None:
    async with behind(NO_FAULTS) as (server, network, client):
        parting = asyncio.create_task(network.part(0))
        await asyncio.sleep(0.1)
        assert not parting.done()
        await client.snapshot("scope")
        assert parting.done() and server.asked == ["scope"] and network.happened["lost_in_partitions"] == 1


def test_a_call_whose_caller_was_killed_has_no_end(tmp_path: Path) -> None:
    collector = Collector(tmp_path)
    recorder = CallRecorder(to_socket(collector.path), "killed")
    recorder.begin("/mulligan.memory.v1.MemoryService/GetSnapshot", pb.GetSnapshotRequest(scope="s"))
    recorder._sink.__self__.close()  # type: ignore[attr-defined]  # its socket
    collector.close()
    (call,) = history.read(tmp_path)
    assert call.end == float("inf") and not call.ok and not call.refused and "no answer" in str(call)
