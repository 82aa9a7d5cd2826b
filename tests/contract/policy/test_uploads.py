"""Weights that are streamed to a service which shares no file system with the trainer."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import save_file

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import PolicyInfo, PublishedWeights, WeightsKind
from mulligan.common.status import from_rpc_error
from mulligan.models.build import build_model, write_untrained
from mulligan.policy import servicer, uploads
from mulligan.policy.client import PolicyClient
from mulligan.policy.v1 import policy_admin_service_pb2 as pb
from mulligan.policy.v1 import policy_admin_service_pb2_grpc as pb_grpc
from mulligan.policy.wire import policy_to_proto
from mulligan.testing.processes import ServiceProcesses
from mulligan.testing.weights import full_weights, load, plain_log_probs, sha256
from tests.support.policy import Serving, serving
from tests.support.waiting import until

PROMPT = list(range(7, 37))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("model"))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
async def served(model: Path, state: Path) -> AsyncIterator[Serving]:
    """It has no weights folder, and room for eleven megabytes."""
    async with serving(model, state_folder=state, upload_gib=0.0105) as served:
        yield served


@pytest.fixture
def client(served: Serving) -> PolicyClient:
    return served.client


@pytest.fixture
def nothing_waits(state: Path) -> Iterator[None]:
    yield
    assert [path for path in (state / "uploads").rglob("*") if path.is_file()] == []


async def next_weights(client: PolicyClient, path: Path, weights: torch.nn.Module) -> PublishedWeights:
    info = await client.info()
    return full_weights(path, weights.state_dict(), info.policy_version + 1, info.fingerprint)


async def serves(client: PolicyClient, version: int, reference: Any) -> None:
    scored = await client.score([PROMPT], 1.0)
    assert scored.policy_version == version
    assert scored.log_probs[0] == pytest.approx(plain_log_probs(reference, PROMPT), abs=1e-4)


async def fails(call: Any, reason: Reason) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await call
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


@pytest.mark.usefixtures("nothing_waits")
async def test_full_weights_in_pieces(client: PolicyClient, tmp_path: Path) -> None:
    large = build_model(1)
    weights = await next_weights(client, tmp_path / "w", large)
    await fails(client.update_weights(weights), Reason.BAD_WEIGHTS_URI)
    uri = await client.upload_weights(tmp_path / "w", weights.kind, weights.sha256)
    uploaded = replace(weights, uri=uri)
    await client.update_weights(uploaded)
    await serves(client, weights.policy_version, large)
    await client.update_weights(uploaded)  # repeated
    again = replace(uploaded, policy_version=weights.policy_version + 1)
    await fails(client.update_weights(again), Reason.WEIGHTS_NOT_FOUND)  # it was for one


@pytest.mark.usefixtures("nothing_waits")
async def test_an_adapter(client: PolicyClient, model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    torch.manual_seed(1)
    reference = load(model)
    target = reference.get_submodule(name)
    down = torch.randn(4, target.in_features)
    up = torch.randn(target.out_features, 4)
    folder = tmp_path / "adapter"
    folder.mkdir()
    prefix = f"base_model.model.{name}"
    path = folder / "adapter_model.safetensors"
    save_file({f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}, path)
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 4, "target_modules": ["q_proj"]}))
    with torch.no_grad():
        target.weight.add_(2 * up @ down)
    info = await client.info()
    uri = await client.upload_weights(folder, WeightsKind.LORA, sha256(path))
    version = info.policy_version + 1
    await client.update_weights(PublishedWeights(version, WeightsKind.LORA, uri, sha256(path), info.fingerprint))
    await serves(client, version, reference)


@pytest.mark.usefixtures("nothing_waits")
async def test_an_adapter_that_is_no_plain_lora_is_refused_before_it_is_sent(
    client: PolicyClient, tmp_path: Path
) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    config = {"lora_alpha": 8, "r": 4, "init_lora_weights": "pissa"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    error = await fails(client.upload_weights(tmp_path, WeightsKind.LORA, sha256(path)), Reason.MODEL_MISMATCH)
    assert 'init_lora_weights = "pissa" is not supported' in error.message


@pytest.mark.usefixtures("nothing_waits")
async def test_what_cannot_serve_is_not_kept(client: PolicyClient, tmp_path: Path) -> None:
    path = tmp_path / "w"
    weights = await next_weights(client, path, build_model(2))
    await fails(client.upload_weights(path, weights.kind, "0" * 64), Reason.CHECKSUM_MISMATCH)
    await fails(client.upload_weights(path, weights.kind, weights.sha256, "nobody"), Reason.UNKNOWN_POLICY)
    large = tmp_path / "large"
    save_file({"x": torch.zeros(3 * 2**20)}, large)
    error = await fails(client.upload_weights(large, weights.kind, sha256(large)), Reason.UPLOAD_TOO_LARGE)
    assert int(error.metadata["size_bytes"]) == large.stat().st_size
    text = tmp_path / "text"
    text.write_text("not weights at all")
    await fails(client.upload_weights(text, weights.kind, sha256(text)), Reason.MODEL_MISMATCH)
    with pytest.raises(FileNotFoundError):
        await client.upload_weights(tmp_path / "none", weights.kind, "0" * 64)


@pytest.mark.usefixtures("nothing_waits")
async def test_the_header_comes_first_and_once(served: Serving) -> None:
    header = pb.UploadWeightsRequest(
        header=pb.UploadWeightsRequest.Header(
            kind=pb.WEIGHTS_KIND_FULL, size_bytes=3, sha256=hashlib.sha256(b"abc").hexdigest()
        )
    )
    piece = pb.UploadWeightsRequest(chunk=b"abc")
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = pb_grpc.PolicyAdminServiceStub(channel)
        for requests in ([], [piece], [header, header, piece], [header]):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.UploadWeights(iter(requests))
            error = from_rpc_error(caught.value)
            assert error is not None and error.reason is Reason.UPLOAD_INCOMPLETE, requests


@pytest.mark.parametrize("sent", [0, 1, 4])
async def test_one_whose_caller_vanishes_leaves_nothing(served: Serving, state: Path, sent: int) -> None:
    """After so many messages; all of the file may have come. Another may use the room at once."""
    uploads = served.policies.uploads
    content = (100).to_bytes(8, "little") + b"{" + bytes(10**7 - 9)
    header = pb.UploadWeightsRequest.Header(
        kind=pb.WEIGHTS_KIND_FULL, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )
    pieces = [content[begin : begin + 3 * 2**20] for begin in range(0, len(content), 3 * 2**20)]
    messages = [pb.UploadWeightsRequest(header=header), *(pb.UploadWeightsRequest(chunk=piece) for piece in pieces)]

    async def requests() -> AsyncIterator[pb.UploadWeightsRequest]:
        for message in messages[: 1 + sent]:
            yield message
        await asyncio.Event().wait()

    def arrived() -> bool:
        files = list((state / "uploads").rglob("*.safetensors"))
        return uploads.reserved_bytes > 0 and sum(file.stat().st_size for file in files) == sum(map(len, pieces[:sent]))

    for _ in range(2):
        async with grpc.aio.insecure_channel(served.address) as channel:
            call = pb_grpc.PolicyAdminServiceStub(channel).UploadWeights(requests())
            await until(arrived)
            call.cancel()
            await until(lambda: uploads.reserved_bytes == 0 and not any((state / "uploads").iterdir()))


async def test_a_stalled_one_is_refused_and_its_room_is_free(model: Path, tmp_path: Path) -> None:
    async with (
        serving(model, state_folder=tmp_path / "state", upload_gib=0.0105, upload_stall_seconds=0.2) as served,
        grpc.aio.insecure_channel(served.address) as channel,
    ):
        stub = pb_grpc.PolicyAdminServiceStub(channel)
        header = pb.UploadWeightsRequest.Header(kind=pb.WEIGHTS_KIND_FULL, size_bytes=10**7, sha256="0" * 64)

        async def requests(first: list[pb.UploadWeightsRequest]) -> AsyncIterator[pb.UploadWeightsRequest]:
            for message in first:
                yield message
            await asyncio.Event().wait()

        for first in ([], [pb.UploadWeightsRequest(header=header)]):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.UploadWeights(requests(first))
            error = from_rpc_error(caught.value)
            assert error is not None and error.reason is Reason.UPLOAD_STALLED and error.retry_after is not None
        assert served.policies.uploads.reserved_bytes == 0
        large = build_model(1)
        weights = await next_weights(served.client, tmp_path / "w", large)
        await served.client.upload_weights(tmp_path / "w", weights.kind, weights.sha256)


async def test_an_upload_is_repeated_while_the_service_is_away(
    client: PolicyClient, services: ServiceProcesses, model: Path, tmp_path: Path
) -> None:
    weights = await next_weights(client, tmp_path / "w", build_model(3))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    patient = PolicyClient(Endpoint(address, outage_seconds=120))
    uploading = asyncio.create_task(patient.upload_weights(tmp_path / "w", weights.kind, weights.sha256))
    await asyncio.to_thread(services.start, "policy", address=address, model=model, threads=1)
    await patient.update_weights(replace(weights, uri=await uploading))
    await serves(patient, 1, build_model(3))
    await patient.close()


@pytest.mark.usefixtures("nothing_waits")
async def test_a_refusal_is_told_though_this_side_still_writes(client: PolicyClient, tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    path.write_bytes(b"\xff" * 10_000_000)
    for _ in range(20):
        await fails(client.upload_weights(path, WeightsKind.FULL, sha256(path)), Reason.MODEL_MISMATCH)


@pytest.mark.usefixtures("nothing_waits")
async def test_a_disk_that_fills_up(client: PolicyClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(part: Path, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(uploads, "move_folder", full)
    path = tmp_path / "weights"
    weights = await next_weights(client, path, build_model(2))
    error = await fails(client.upload_weights(path, WeightsKind.FULL, weights.sha256), Reason.DISK_FULL)
    assert "is full" in error.message


class Sent:
    """What was announced of each upload that was taken, in their order: the bytes, and the base of a sparse file."""

    def __init__(self, served: Serving, monkeypatch: pytest.MonkeyPatch):
        self.bytes: list[int] = []
        self.bases: list[str] = []
        receive = served.policies.uploads.receive

        async def recorded(header: uploads.UploadHeader, *others: Any) -> str:
            uri = await receive(header, *others)
            self.bytes.append(header.size_bytes)
            self.bases.append(header.base_sha256)
            return uri

        monkeypatch.setattr(served.policies.uploads, "receive", recorded)


@pytest.fixture
def sent(served: Serving, monkeypatch: pytest.MonkeyPatch) -> Sent:
    return Sent(served, monkeypatch)


def step(weights: torch.nn.Module, every: int, amount: float = 0.5) -> None:
    """Moves some of the values, as a training step in bfloat16 does."""
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.view(-1)[::every] += amount


async def published(client: PolicyClient, path: Path, weights: torch.nn.Module) -> PublishedWeights:
    """Uploaded and served, as a version that never was."""
    [newest, *_] = await client.versions()
    fingerprint = (await client.info()).fingerprint
    described = full_weights(path, weights.state_dict(), newest.policy_version + 1, fingerprint)
    uri = await client.upload_weights(path, described.kind, described.sha256)
    await client.update_weights(replace(described, uri=uri))
    return described


@pytest.mark.usefixtures("nothing_waits")
async def test_what_changed_is_sent_and_the_whole_version_serves(
    client: PolicyClient, sent: Sent, state: Path, tmp_path: Path
) -> None:
    weights = build_model(1)
    first = await published(client, tmp_path / "1", weights)
    step(weights, every=100)
    second = await published(client, tmp_path / "2", weights)
    await serves(client, second.policy_version, weights)
    assert sent.bases == ["", first.sha256] and sent.bytes[1] < sent.bytes[0] / 20
    kept = state / "policies" / "actor" / "files" / str(second.policy_version) / "model.safetensors"
    assert kept.read_bytes() == (tmp_path / "2").read_bytes()
    await client.rollback(first.policy_version)
    await serves(client, first.policy_version, build_model(1))
    step(weights, every=100)
    third = await published(client, tmp_path / "3", weights)  # its base was withdrawn
    await serves(client, third.policy_version, weights)
    assert sent.bases[2:] == [""]


@pytest.mark.usefixtures("nothing_waits")
async def test_the_whole_file_follows_where_a_sparse_one_is_no_use(
    client: PolicyClient, sent: Sent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = build_model(1)
    await published(client, tmp_path / "1", weights)
    step(weights, every=1)
    await published(client, tmp_path / "2", weights)  # everything changed
    (tmp_path / "2").unlink()
    step(weights, every=100)
    await published(client, tmp_path / "3", weights)  # the trainer's base is gone
    save_file({"x": torch.ones(3)}, tmp_path / "3")
    step(weights, every=100)
    await published(client, tmp_path / "4", weights)  # it is another file by now
    step(weights, every=100)
    full_weights(tmp_path / "4", weights.state_dict(), 0, "")  # nothing seems to differ, and the server's base does
    await published(client, tmp_path / "5", weights)
    await serves(client, 5, weights)
    assert sent.bases == [""] * 5

    def without_sparse(info: PolicyInfo) -> Any:
        return policy_to_proto(replace(info, sparse_uploads=False))

    monkeypatch.setattr(servicer, "policy_to_proto", without_sparse)
    step(weights, every=100)
    await published(client, tmp_path / "6", weights)  # a server that does not take it
    await serves(client, 6, weights)
    assert sent.bases == [""] * 6


async def test_a_service_that_lost_the_base_gets_the_whole_file(
    services: ServiceProcesses, model: Path, tmp_path: Path
) -> None:
    running = services.start("policy", model=model, threads=1)
    client = PolicyClient(Endpoint(running.address, outage_seconds=120))
    weights = build_model(1)
    await published(client, tmp_path / "1", weights)
    running.kill()
    running.restart()
    step(weights, every=100)
    described = await published(client, tmp_path / "2", weights)
    await serves(client, described.policy_version, weights)
    await client.close()


async def test_a_base_that_is_not_kept_is_refused_before_anything_is_sent(served: Serving) -> None:
    header = pb.UploadWeightsRequest.Header(
        kind=pb.WEIGHTS_KIND_FULL, size_bytes=10**6, sha256="0" * 64, base_sha256="1" * 64
    )
    async with grpc.aio.insecure_channel(served.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.PolicyAdminServiceStub(channel).UploadWeights(iter([pb.UploadWeightsRequest(header=header)]))
    error = from_rpc_error(caught.value)
    assert error is not None and error.reason is Reason.VERSION_NOT_KEPT and "1" * 64 in error.message
