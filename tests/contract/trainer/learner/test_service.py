"""The contract of the learner service, over gRPC on loopback: exactly-once calls, ownership, restarts, errors."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, Reason
from mulligan.common.inference import WeightsKind
from mulligan.common.server import RequestInterceptor
from mulligan.common.status import from_rpc_error
from mulligan.trainer.learner import client as client_module
from mulligan.trainer.learner.client import LearnerClient
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.servicer import LearnerServicer
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerSpec
from mulligan.trainer.learner.wire import data_to_proto, loss_to_proto
from mulligan.trainer.losses import ppo
from mulligan.trainer.v1 import learner_service_pb2 as pb
from mulligan.trainer.v1 import learner_service_pb2_grpc as pb_grpc
from tests.support.learning import LORA, PLAIN, many, sampled, server_settings, spec
from tests.support.tiny_model import write_tiny_model
from tests.support.waiting import until
from tests.unit.trainer.learner.test_storage import path_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@asynccontextmanager
async def serving(settings: LearnerServerSettings, port: int = 0) -> AsyncIterator[str]:
    """A server with the interceptor of all services; its address."""
    servicer = LearnerServicer(settings)
    server = grpc.aio.server(interceptors=[RequestInterceptor()], options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_LearnerServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
        await servicer.close()


@pytest.fixture
def settings(tmp_path: Path) -> LearnerServerSettings:
    return server_settings(tmp_path)


@pytest.fixture
async def address(settings: LearnerServerSettings) -> AsyncIterator[str]:
    async with serving(settings) as address:
        yield address


@pytest.fixture
async def client(address: str, tiny: Path) -> AsyncIterator[LearnerClient]:
    client = await LearnerClient.create(Endpoint(address, outage_seconds=5), "learner", "run", spec(tiny))
    yield client
    await client.close()


@pytest.fixture
async def stub(address: str) -> AsyncIterator[pb_grpc.LearnerServiceStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield pb_grpc.LearnerServiceStub(channel)


def forward_backward(sequence: int, advantage: float = 1.0, **changes: Any) -> pb.ForwardBackwardRequest:
    data = data_to_proto([sampled(advantage=advantage)])
    ids = {"learner_id": "learner", "owner": "run"} | changes
    return pb.ForwardBackwardRequest(sequence=sequence, data=data, loss=loss_to_proto(PLAIN), **ids)


def optim_step(sequence: int) -> pb.OptimStepRequest:
    return pb.OptimStepRequest(learner_id="learner", owner="run", sequence=sequence)


async def refusal(call: Awaitable[Any]) -> DomainError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    assert error is not None, caught.value
    return error


async def test_over_the_wire_is_as_in_process(client: LearnerClient, tiny: Path, tmp_path: Path) -> None:
    local = Learner("local", spec(tiny), server_settings(tmp_path / "local"))
    data = many(9)
    loss = ppo.Settings(kl_coefficient=0.1, entropy_coefficient=0.01)
    assert client.fingerprint == local.fingerprint and client.limits == local.model.limits
    assert await client.forward(data) == local.forward(data)
    for _ in range(2):
        assert await client.forward_backward(data, loss) == pytest.approx(local.forward_backward(data, loss))
        assert await client.optim_step() == local.optim_step()
    assert await client.forward(data) == local.forward(data)
    published = await client.publish_weights(7)
    assert (published.policy_version, published.kind) == (7, WeightsKind.FULL)
    expected = local.publish_weights(7)
    assert (published.sha256, published.canary) == (expected.sha256, expected.canary) and published.canary
    for version in range(8, 12):
        await client.publish_weights(version, keep=[7])
    assert path_of(published).exists(), "it was asked to stay"
    await client.publish_weights(12)
    assert not path_of(published).exists()


async def test_many_data_go_in_several_messages(
    client: LearnerClient, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Learner("local", spec(tiny), server_settings(tmp_path / "local"))
    monkeypatch.setattr(client_module, "CALL_BYTES", 1000)
    data = many(30)
    for found, wanted in zip(await client.forward(data), local.forward(data), strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    expected = local.forward_backward(data, PLAIN)
    metrics = await client.forward_backward(data, PLAIN)
    assert metrics.pop("computed_tokens") >= expected.pop("computed_tokens")  # what messages share is computed for each
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert (await client.optim_step())["grad_norm"] == pytest.approx(local.optim_step()["grad_norm"], rel=1e-5)


async def test_nothing_to_learn_from_is_no_error(client: LearnerClient) -> None:
    assert await client.forward([]) == []
    assert await client.forward_backward([], PLAIN) == {}
    assert (await client.optim_step())["skipped"] == 1


async def test_a_repeated_call_accumulates_once(
    client: LearnerClient, stub: pb_grpc.LearnerServiceStub, tiny: Path, tmp_path: Path
) -> None:
    local = Learner("local", spec(tiny), server_settings(tmp_path / "local"))
    local.forward_backward([sampled()], PLAIN)
    answers = [await stub.ForwardBackward(forward_backward(1)) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    expected = local.optim_step()
    steps = [await stub.OptimStep(optim_step(2)) for _ in range(3)]
    assert all(dict(step.metrics) == expected for step in steps)
    assert await client.forward([sampled()]) == local.forward([sampled()])
    state = await stub.GetLearner(pb.GetLearnerRequest(learner_id="learner"))
    assert (state.next_sequence, state.optimizer_steps, state.owner) == (3, 1, "run")


async def test_concurrent_repetitions_accumulate_once(client: LearnerClient, stub: pb_grpc.LearnerServiceStub) -> None:
    answers = await asyncio.gather(*(stub.ForwardBackward(forward_backward(1)) for _ in range(8)))
    assert all(answer == answers[0] for answer in answers)
    assert (await stub.GetLearner(pb.GetLearnerRequest(learner_id="learner"))).next_sequence == 2


async def test_a_lost_answer_is_harmless(
    client: LearnerClient, stub: pb_grpc.LearnerServiceStub, tiny: Path, tmp_path: Path
) -> None:
    """The client's own retry, after the server did the work and the connection broke."""
    local = Learner("local", spec(tiny), server_settings(tmp_path / "local"))
    lost = 0

    def losing(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        answered: set[bytes] = set()

        async def call(request: Any, **options: Any) -> Any:
            nonlocal lost
            answer = await method(request, **options)
            key = request.SerializeToString(deterministic=True)
            if key not in answered:
                answered.add(key)
                lost += 1
                raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata())
            return answer

        return call

    calls: Any = client._stub
    calls.ForwardBackward = losing(calls.ForwardBackward)
    calls.OptimStep = losing(calls.OptimStep)
    for _ in range(2):
        local.forward_backward([sampled()], PLAIN)
        local.optim_step()
        await client.forward_backward([sampled()], PLAIN)
        await client.optim_step()
    assert lost == 4
    assert await client.forward([sampled()]) == local.forward([sampled()])


async def test_a_call_that_its_caller_gave_up_on_counts_once(
    client: LearnerClient, stub: pb_grpc.LearnerServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    go_on = threading.Event()
    real = Learner.forward_backward

    def slow(learner: Learner, *arguments: Any) -> dict[str, float]:
        begun.set()
        assert go_on.wait(60)
        return real(learner, *arguments)

    monkeypatch.setattr(Learner, "forward_backward", slow)
    call = stub.ForwardBackward(forward_backward(1))
    waiting = asyncio.ensure_future(call)
    await until(begun.is_set)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    monkeypatch.undo()
    again = asyncio.ensure_future(stub.ForwardBackward(forward_backward(1)))
    await asyncio.sleep(0.05)
    go_on.set()
    assert (await again).metrics["tokens"] == 2
    assert (await stub.GetLearner(pb.GetLearnerRequest(learner_id="learner"))).next_sequence == 2


async def test_bad_data_are_named_and_the_sequence_goes_on(client: LearnerClient, tiny: Path) -> None:
    with pytest.raises(DomainError) as caught:
        await client.forward_backward([sampled(), sampled("culprit", tokens=(2, 3, 4, 5, 999))], PLAIN)
    assert caught.value.metadata["field"] == "data[1].token_ids[4]" and "culprit" in caught.value.message
    assert (await client.forward_backward([sampled()], PLAIN))["tokens"] == 2


async def test_only_the_owner_may(client: LearnerClient, stub: pb_grpc.LearnerServiceStub) -> None:
    ids: dict[str, Any] = {"learner_id": "learner", "owner": "somebody else"}
    for call in (
        stub.CreateLearner(pb.CreateLearnerRequest(**ids)),
        stub.Forward(pb.ForwardRequest(**ids)),
        stub.ForwardBackward(forward_backward(1, owner="somebody else")),
        stub.OptimStep(pb.OptimStepRequest(sequence=1, **ids)),
        stub.SaveCheckpoint(pb.SaveCheckpointRequest(name="one", **ids)),
        stub.LoadCheckpoint(pb.LoadCheckpointRequest(name="one", **ids)),
        stub.PublishWeights(pb.PublishWeightsRequest(policy_version=1, **ids)),
        stub.DeleteLearner(pb.DeleteLearnerRequest(**ids)),
    ):
        error = await refusal(call)
        assert (error.reason, error.metadata) == (Reason.LEARNER_OWNED, {"owner": "run"})
    await client.forward([sampled()])  # still there


async def test_creating_again(client: LearnerClient, address: str, tiny: Path) -> None:
    endpoint = Endpoint(address, outage_seconds=5)
    await client.forward_backward([sampled()], PLAIN)
    again = await LearnerClient.create(endpoint, "learner", "run", spec(tiny))
    assert (await again.optim_step())["skipped"] == 0  # it knows where counting stands
    other = replace(spec(tiny), seed=5)
    for learner_id, settings, reason in (
        ("learner", other, Reason.LEARNER_CONFLICT),
        ("second", spec(tiny), Reason.CAPACITY_REACHED),
    ):
        with pytest.raises(DomainError) as caught:
            await LearnerClient.create(endpoint, learner_id, "run", settings)
        assert caught.value.reason is reason
    await again.close()  # deletes it
    second = await LearnerClient.create(endpoint, "second", "run", spec(tiny))
    await second.close()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"learner_id": "../escape"}, "learner_id"),
        ({"owner": ""}, "owner"),
        ({"model": pb.ModelConfig(dtype="float16")}, "model.dtype"),
        ({"model": pb.ModelConfig(dtype="int8")}, "model.dtype"),
        ({"model": pb.ModelConfig(lora=pb.LoraConfig(rank=0))}, "model.lora.rank"),
        ({"optimizer": pb.OptimizerConfig(learning_rate=-1.0)}, "optimizer.learning_rate"),
    ],
)
async def test_bad_settings_are_named(stub: pb_grpc.LearnerServiceStub, change: dict[str, Any], field: str) -> None:
    error = await refusal(stub.CreateLearner(pb.CreateLearnerRequest(**({"learner_id": "a", "owner": "run"} | change))))
    assert (error.reason, error.metadata["field"]) == (Reason.INVALID_FIELD, field)


async def test_a_model_that_is_not_there(address: str, tiny: Path) -> None:
    with pytest.raises(DomainError) as caught:
        await LearnerClient.create(Endpoint(address), "learner", "run", spec(Path("/nowhere")))
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize("lora", [None, LORA])
async def test_after_a_restart_the_owner_goes_on_from_a_checkpoint(
    tiny: Path, tmp_path: Path, settings: LearnerServerSettings, lora: Any
) -> None:
    learner: LearnerSpec = spec(tiny, lora, deterministic=True)
    straight = Learner("straight", learner, server_settings(tmp_path / "straight"))
    for step in range(4):
        straight.forward_backward(many(6, seed=step), PLAIN)
        straight.optim_step()
    async with serving(settings) as address:
        client = await LearnerClient.create(Endpoint(address, outage_seconds=10), "learner", "run", learner)
        for step in range(2):
            await client.forward_backward(many(6, seed=step), PLAIN)
            await client.optim_step()
        await client.save_checkpoint("two")
        await client.forward_backward(many(6, seed=9), PLAIN)  # will be lost
    async with serving(settings, port=int(address.rpartition(":")[2])) as address:
        with pytest.raises(DomainError) as caught:
            await client.optim_step()
        assert caught.value.reason is Reason.UNKNOWN_LEARNER
        await client.close()
        client = await LearnerClient.create(Endpoint(address), "learner", "run", learner)
        await client.load_checkpoint("two")
        for step in range(2, 4):
            await client.forward_backward(many(6, seed=step), PLAIN)
            await client.optim_step()
        assert await client.forward(many(6)) == straight.forward(many(6))
        await client.close()


async def test_a_bad_checkpoint_is_named_and_the_service_serves_on(
    client: LearnerClient, settings: LearnerServerSettings
) -> None:
    before = await client.forward([sampled()])
    await client.save_checkpoint("one")
    for path in (settings.checkpoint_folder / "learner" / "one").glob("weights-*"):
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    for name, reason in (("one", Reason.CHECKPOINT_MISMATCH), ("none", Reason.CHECKPOINT_NOT_FOUND)):
        with pytest.raises(DomainError) as caught:
            await client.load_checkpoint(name)
        assert (caught.value.reason, caught.value.metadata["name"]) == (reason, name)
    assert await client.forward([sampled()]) == before
    assert (await client.forward_backward([sampled()], PLAIN))["tokens"] == 2


async def test_a_failure_in_the_middle_drops_the_learner(
    client: LearnerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an accumulated gradient is worse than none: the owner goes on from a checkpoint."""

    def fails(learner: Learner, *arguments: Any) -> dict[str, float]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Learner, "forward_backward", fails)
    with pytest.raises(CallFailed):
        await client.forward_backward([sampled()], PLAIN)
    monkeypatch.undo()
    with pytest.raises(DomainError) as caught:
        await client.forward_backward([sampled()], PLAIN)
    assert caught.value.reason is Reason.UNKNOWN_LEARNER


async def test_a_full_disk_costs_no_learner(client: LearnerClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(learner: Learner, *arguments: Any) -> None:
        raise OSError("no space left on device")

    before = await client.forward([sampled()])
    monkeypatch.setattr(Learner, "save_checkpoint", fails)
    with pytest.raises(CallFailed):
        await client.save_checkpoint("one")
    monkeypatch.undo()
    assert await client.forward([sampled()]) == before
    await client.save_checkpoint("one")


async def test_deleting_is_idempotent(client: LearnerClient) -> None:
    await client.delete()
    await client.delete()
    with pytest.raises(DomainError) as caught:
        await client.publish_weights(1)
    assert caught.value.reason is Reason.UNKNOWN_LEARNER


async def test_how_far_a_call_is_can_be_asked_meanwhile(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the data need several calls."""
    async with serving(server_settings(tmp_path, microbatch_tokens=50)) as address:
        client = await LearnerClient.create(Endpoint(address), "learner", "run", spec(tiny))
        try:
            await _is_followed(client, address, monkeypatch)
        finally:
            await client.close()


async def _is_followed(client: LearnerClient, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FOLLOW_SECONDS", 0.005)
    data = many(40)
    monkeypatch.setattr(client_module, "CALL_BYTES", sum(map(client_module._message_bytes, data)) // 2)
    inner = Learner._total

    def slow(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(0.05)
        return inner(*arguments, **keywords)

    monkeypatch.setattr(Learner, "_total", slow)
    seen: list[float] = []
    call = asyncio.create_task(client.forward_backward(data, PLAIN))
    while not call.done():
        seen.append(client.share_done)
        await asyncio.sleep(0.005)
    await call
    assert seen == sorted(seen) and seen[0] == 0.0
    assert len({share for share in seen if share < 0.5}) > 1 and len({share for share in seen if share > 0.5}) > 1
    async with grpc.aio.insecure_channel(address) as channel:
        found = await pb_grpc.LearnerServiceStub(channel).GetLearner(pb.GetLearnerRequest(learner_id="learner"))
    assert (found.done_tokens, found.total_tokens) == (0, 0)
    await client.optim_step()
    call = asyncio.create_task(client.forward_backward(data[:1], PLAIN))
    await asyncio.sleep(0)
    assert client.share_done == 0.0, "of the call before"
    await call
