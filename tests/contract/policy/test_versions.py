"""Versions of a policy: kept, listed, rolled back, and there again after SIGKILL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
import torch

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import (
    CallOptions,
    PolicyState,
    PublishedWeights,
    SamplingParams,
    VersionState,
    WeightsKind,
)
from mulligan.common.status import from_rpc_error
from mulligan.models.build import build_model, write_untrained
from mulligan.policy.client import PolicyClient
from mulligan.policy.model_settings import ModelSettings
from mulligan.policy.v1 import policy_admin_service_pb2 as pb
from mulligan.policy.v1 import policy_admin_service_pb2_grpc as pb_grpc
from mulligan.testing.processes import ServiceProcesses
from mulligan.testing.weights import full_weights, load, plain_log_probs
from tests.support.faulty import ForgetfulBackend, changed, corrupted
from tests.support.policy import serving

PROMPT = list(range(7, 37))
SERVING = VersionState.SERVING
KEPT = VersionState.KEPT
REMOVED = VersionState.REMOVED


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("model"))


class Policy:
    """A service, and what a trainer does with it."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings
        self.running = AsyncExitStack()
        self.client: PolicyClient
        self.address = ""

    async def start(self, **changes: Any) -> None:
        """Also again, with changed settings."""
        await self.running.aclose()
        self.settings |= changes
        served = await self.running.enter_async_context(serving(**self.settings))
        self.client = served.client
        self.address = served.address

    async def published(self, version: int, weights: torch.nn.Module) -> PublishedWeights:
        fingerprint = (await self.client.info()).fingerprint
        return full_weights(self.folder / f"{version}.safetensors", weights.state_dict(), version, fingerprint)

    async def update(self, *versions: int) -> None:
        """Version n has the weights of build_model(n)."""
        for version in versions:
            await self.client.update_weights(await self.published(version, build_model(version)))

    async def serves(self, version: int, reference: Any) -> None:
        assert (await self.client.info()).policy_version == version
        scored = await self.client.score([PROMPT], 1.0, CallOptions(min_policy_version=version))
        assert scored.policy_version == version
        assert scored.log_probs[0] == pytest.approx(plain_log_probs(reference, PROMPT), abs=1e-4)

    async def states(self) -> dict[int, VersionState]:
        return {version.policy_version: version.state for version in await self.client.versions()}

    async def refuses(self, call: Any, reason: Reason) -> DomainError:
        with pytest.raises(DomainError) as caught:
            await call
        assert caught.value.reason is reason, str(caught.value)
        return caught.value


@asynccontextmanager
async def policy_of(model: Path, folder: Path, **settings: Any) -> AsyncIterator[Policy]:
    weights = folder / "weights"
    weights.mkdir()
    policy = Policy(weights, {"model": model, "weights_folder": weights, "context_length": 64, **settings})
    try:
        await policy.start()
        yield policy
    finally:
        await policy.running.aclose()


class Events:
    """What was logged so far: `"rolled back" in events`."""

    def __init__(self, entries: Sequence[Any]):
        self._entries = entries

    def __contains__(self, event: object) -> bool:
        return any(entry["event"] == event for entry in self._entries)


@pytest.fixture
def logged() -> Iterator[Events]:
    with structlog.testing.capture_logs() as entries:
        yield Events(entries)


async def test_the_last_versions_are_kept_and_can_serve_again(model: Path, tmp_path: Path, logged: Events) -> None:
    state = tmp_path / "state"
    async with policy_of(model, tmp_path, state_folder=state, keep_versions=3) as policy:
        await policy.update(1, 2, 3, 5)
        for file in policy.folder.iterdir():
            file.unlink()  # the trainer keeps none
        assert await policy.states() == {5: SERVING, 3: KEPT, 2: KEPT, 1: REMOVED, 0: KEPT}
        newest = (await policy.client.versions())[0]
        assert (newest.policy_version, newest.kind, newest.model) == (5, WeightsKind.FULL, model.name)
        assert len(newest.sha256) == len(newest.engine_checksum) == 64
        assert newest.fingerprint == (await policy.client.info()).fingerprint

        error = await policy.refuses(policy.client.rollback(1), Reason.VERSION_NOT_KEPT)
        assert "version 1" in error.message
        await policy.refuses(policy.client.rollback(4), Reason.VERSION_NOT_KEPT)
        await policy.client.rollback(5)  # it serves
        await policy.serves(5, build_model(5))
        await policy.client.rollback(2)
        await policy.client.rollback(2)
        await policy.serves(2, build_model(2))
        withdrawn = VersionState.WITHDRAWN
        assert await policy.states() == {5: withdrawn, 3: withdrawn, 2: SERVING, 1: REMOVED, 0: KEPT}
        assert "rolled back to version 2" in (await policy.client.versions())[0].problem

        for version in (3, 5, 1):  # withdrawn for good; not greater
            error = await policy.refuses(policy.update(version), Reason.VERSION_CONFLICT)
            assert error.metadata == {"policy_version": "2", "next_version": "6"}
        await policy.refuses(policy.client.rollback(5), Reason.VERSION_NOT_KEPT)
        await policy.update(6)
        await policy.client.rollback(0)
        await policy.serves(0, load(model))
        assert "rolled back" in logged
        files = {path.name for path in state.rglob("*.safetensors")}
        assert files == set(), "what can never serve again takes no space"


async def test_a_version_that_is_known_with_other_weights_is_refused(model: Path, tmp_path: Path) -> None:
    async with policy_of(model, tmp_path, keep_versions=1) as policy:
        await policy.update(1, 2)
        for version in (1, 2):
            other = replace(await policy.published(version, build_model(9)), policy_version=version)
            error = await policy.refuses(policy.client.update_weights(other), Reason.VERSION_CONFLICT)
            assert "other weights" in error.message and error.metadata["policy_version"] == "2"
        await policy.update(2)  # a repeated call
        assert await policy.states() == {2: SERVING, 1: REMOVED, 0: KEPT}


async def test_after_a_kill_it_serves_what_it_served(services: ServiceProcesses, model: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    state = tmp_path / "state"
    weights.mkdir()
    process = services.start("policy", model=model, weights_folder=weights, state_folder=state, threads=1)
    client = PolicyClient(Endpoint(process.address, outage_seconds=60))
    fingerprint = (await client.info()).fingerprint
    for version in (3, 7):
        tensors = build_model(version).state_dict()
        await client.update_weights(full_weights(weights / f"{version}", tensors, version, fingerprint))
    params = SamplingParams(max_tokens=5, seed=3)
    before = await client.generate(PROMPT, params)
    for file in weights.iterdir():
        file.unlink()
    process.restart()
    assert (await client.generate(PROMPT, params, CallOptions(min_policy_version=7))) == before
    states = {version.policy_version: version.state for version in await client.versions()}
    assert states == {7: SERVING, 3: KEPT, 0: KEPT}
    await client.close()


async def test_after_a_restart_a_rollback_holds(model: Path, tmp_path: Path) -> None:
    async with policy_of(model, tmp_path, state_folder=tmp_path / "state") as policy:
        await policy.update(3, 7)
        await policy.client.rollback(0)
        await policy.start()
        await policy.serves(0, load(model))
        assert set((await policy.states()).values()) == {SERVING, VersionState.WITHDRAWN}
        await policy.update(8)
        await policy.start()
        await policy.serves(8, build_model(8))


async def test_after_a_restart_a_damaged_file_is_not_served(model: Path, tmp_path: Path, logged: Events) -> None:
    async with policy_of(model, tmp_path, state_folder=tmp_path / "state") as policy:
        await policy.update(1, 2)
        for file in policy.folder.glob("2.*"):  # linked: its writer can still change it
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            with file.open("r+b") as stream:
                stream.write(content)
        await policy.start()
        await policy.serves(1, build_model(1))
        assert "a version cannot be restored" in logged
        assert await policy.states() == {2: REMOVED, 1: SERVING, 0: KEPT}
        await policy.update(2)  # the trainer brings it again
        await policy.serves(2, build_model(2))


async def test_another_model_begins_with_the_next_version(model: Path, tmp_path: Path, logged: Events) -> None:
    """Whether the settings name another, or the same folder has another content."""
    one = write_untrained(tmp_path / "one")
    async with policy_of(one, tmp_path, state_folder=tmp_path / "state") as policy:
        await policy.update(4)
        await policy.start(model=model)
        await policy.serves(5, load(model))
        assert await policy.states() == {5: SERVING, 4: REMOVED, 0: REMOVED}
        await policy.refuses(policy.client.rollback(4), Reason.VERSION_NOT_KEPT)
        await policy.start(model=one)
        await policy.serves(6, load(one))
        build_model(17).save_pretrained(one)
        assert "another model than before" not in logged
        await policy.start()
        await policy.serves(7, load(one))
        assert "another model than before" in logged
        await policy.update(8)


async def test_versions_come_in_pages(model: Path, tmp_path: Path) -> None:
    async with policy_of(model, tmp_path) as policy, grpc.aio.insecure_channel(policy.address) as to:
        await policy.update(1, 2, 3)
        stub = pb_grpc.PolicyAdminServiceStub(to)
        first = await stub.ListVersions(pb.ListVersionsRequest(page_size=3))
        assert [version.policy_version for version in first.versions] == [3, 2, 1]
        await policy.update(4)
        rest = await stub.ListVersions(pb.ListVersionsRequest(page_size=3, page_token=first.next_page_token))
        assert [version.policy_version for version in rest.versions] == [0] and not rest.next_page_token
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListVersions(pb.ListVersionsRequest(page_token="x"))
        error = from_rpc_error(caught.value)
        assert error is not None and error.reason is Reason.BAD_PAGE_TOKEN
        assert [version.policy_version for version in await policy.client.versions()] == [4, 3, 2, 1, 0]
        await policy.refuses(policy.client.versions("nobody"), Reason.UNKNOWN_POLICY)


async def test_frozen_weights_do_not_change(model: Path, tmp_path: Path) -> None:
    async with policy_of(model, tmp_path, frozen=True) as policy:
        await policy.refuses(policy.update(1), Reason.POLICY_FROZEN)
        await policy.refuses(policy.client.rollback(0), Reason.POLICY_FROZEN)
        await policy.serves(0, load(model))
        error = await policy.refuses(policy.client.release_memory(), Reason.UNSUPPORTED_OPTION)
        assert error.metadata["feature"] == "memory_release"
        await policy.refuses(policy.client.resume_memory(), Reason.UNSUPPORTED_OPTION)


async def test_memory_is_given_back_while_calls_wait(model: Path, tmp_path: Path) -> None:
    backends: list[ForgetfulBackend] = []

    async def create(settings: ModelSettings, folder: Path, first_version: int) -> ForgetfulBackend:
        backends.append(ForgetfulBackend(settings, first_version))
        return backends[0]

    async with policy_of(model, tmp_path, create=create) as policy:
        await policy.update(1)
        [backend] = backends
        for _ in range(2):
            await policy.client.release_memory()
        assert backend.released and (await policy.client.info()).state is PolicyState.RELEASED
        call = asyncio.create_task(policy.client.generate(PROMPT, SamplingParams(max_tokens=2)))
        await policy.refuses(policy.update(2), Reason.ENGINE_UNAVAILABLE)
        await policy.refuses(policy.client.rollback(0), Reason.ENGINE_UNAVAILABLE)
        await asyncio.sleep(0.1)
        assert not call.done()
        for _ in range(2):
            await policy.client.resume_memory()
        assert not backend.released
        assert [span.policy_version for span in (await call).policy_versions] == [1]
        await policy.serves(1, build_model(1))
        await policy.client.release_memory()
        backend.faults = [changed(tmp_path, corrupted)]
        await policy.refuses(policy.client.resume_memory(), Reason.POLICY_REFUSED)
        await policy.update(2)
        await policy.serves(2, build_model(2))
