"""Which calls pass, wait and fail while the weights of a deployment change, on a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import (
    CanaryProbe,
    PolicyState,
    PolicyVersion,
    PublishedWeights,
    ReplicaInfo,
    VersionSpan,
    VersionState,
    WeightsKind,
)
from mulligan.policy.backend import Scored
from mulligan.policy.config import PolicySettings
from mulligan.policy.deployment import Deployment
from mulligan.policy.uploads import Uploads
from mulligan.policy.version_table import VersionRecord
from mulligan.policy.versions import VersionStore
from mulligan.testing.weights import sha256
from tests.support.scripted import ScriptedBackend
from tests.support.waiting import until

PROBE = CanaryProbe((1, 2, 3), (-1.0, -1.0))  # what the engine scores while its weights are right


class Engine(ScriptedBackend):
    """`wrong` are versions that it does not load right; `says` is its checksum of all that it loads."""

    wrong: Sequence[int] = ()
    says = ""

    async def checksum(self) -> str:
        return self.says

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float, adapter: str = "") -> Scored:
        scored = await super().score(sequences, temperature, adapter)
        if self.policy_version in self.wrong:
            return Scored(tuple(tuple(2 * value for value in row) for row in scored.log_probs), scored.policy_version)
        return scored


class Served:
    def __init__(self, folder: Path, store: VersionStore, uploads: Uploads):
        settings = PolicySettings(model="one", weights_folder=folder)
        self.folder = folder
        self.store = store
        self.engine = Engine(settings)
        self.deployment = Deployment("actor", settings, settings, self.engine, store, folder, uploads)

    async def update(self, version: int) -> None:
        path = self.folder / f"{version}.safetensors"
        save_file({"w": np.full(3, version, np.float32)}, path)
        weights = PublishedWeights(version, WeightsKind.FULL, path.as_uri(), sha256(path), "one", (PROBE,))
        await self.deployment.update_weights(weights)

    async def checking(self, version: int) -> asyncio.Task[None]:
        """An update that has come to the check of the engine, which waits for `engine.judge`."""
        self.engine.judge.clear()
        updating = asyncio.create_task(self.update(version))
        await until(lambda: self.engine.policy_version == version)
        assert self.deployment.state is PolicyState.UPDATING
        return updating

    async def passes(self, version: int | None = None, wait: float = 0.0) -> int:
        async with self.deployment.serving(version, wait):
            return self.deployment.policy_version

    def states(self) -> dict[int, VersionState]:
        return {version.policy_version: version.state for version in self.store.versions(None, 10)}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    store = VersionStore(None, 2)
    uploads = Uploads(None, 0)
    served = Served(tmp_path, store, uploads)
    await served.deployment.start()
    yield served
    await served.deployment.close()
    uploads.close()
    store.close()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def refuses(call: Awaitable[object], reason: Reason) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await call
    assert caught.value.reason is reason
    return caught.value


async def test_a_checksum_that_an_older_service_kept_is_compared(tmp_path: Path) -> None:
    """Under the setup that 0.1.0 wrote: the model's folder has other content by now."""
    settings = PolicySettings.model_validate(
        {"model": "one", "backend": "sglang", "sglang": {"flags": ["--tp", "2"]}, "weights_folder": tmp_path}
    )
    for checksum, version in (("abc", 0), ("def", 1)):
        store = VersionStore(None, 2)
        uploads = Uploads(None, 0)
        kept = PolicyVersion(
            policy_version=0,
            kind=WeightsKind.ORIGINAL,
            state=VersionState.SERVING,
            sha256="",
            fingerprint="one",
            created_at=datetime.now(UTC),
            engine_checksum="abc",
            model="one",
        )
        store.begin(VersionRecord(kept, 0, "sglang:one", "7ac32d412fa4a9c0"))
        engine = Engine(settings)
        engine.says = checksum
        deployment = Deployment("actor", settings, settings, engine, store, tmp_path, uploads)
        await deployment.start()
        assert deployment.policy_version == version
        await deployment.close()
        uploads.close()
        store.close()


async def test_calls_wait_while_weights_change(served: Served) -> None:
    updating = await served.checking(3)
    calls = [asyncio.create_task(served.passes(version)) for version in (None, 0, 3)]
    await settle()
    assert not any(call.done() for call in calls)
    served.engine.judge.set()
    assert await asyncio.gather(*calls) == [3, 3, 3]
    await updating
    assert served.deployment.in_flight == 0


async def test_calls_wait_while_memory_is_released(served: Served) -> None:
    await served.deployment.release_memory()
    assert served.deployment.state is PolicyState.RELEASED
    calls = [asyncio.create_task(served.passes(version)) for version in (None, 0)]
    await settle()
    assert not any(call.done() for call in calls)
    await refuses(served.update(1), Reason.ENGINE_UNAVAILABLE)
    await served.deployment.resume_memory()
    assert await asyncio.gather(*calls) == [0, 0]


async def test_memory_is_released_when_no_call_is_in_flight(served: Served) -> None:
    async with served.deployment.serving():
        releasing = asyncio.create_task(served.deployment.release_memory())
        await settle()
        assert not releasing.done() and served.deployment.in_flight == 1
    await releasing


async def test_a_version_is_waited_for_as_long_as_asked(served: Served) -> None:
    error = await refuses(served.passes(1), Reason.POLICY_VERSION_TOO_OLD)
    assert error.metadata == {"policy_version": "0"}
    await refuses(served.passes(1, 0.01), Reason.POLICY_VERSION_TOO_OLD)
    waiting = asyncio.create_task(served.passes(2, 3600))
    await settle()
    await served.update(1)
    await settle()
    assert not waiting.done()
    await served.update(2)
    assert await waiting == 2


async def test_a_version_that_fails_its_check_is_refused_and_the_one_before_serves(served: Served) -> None:
    await served.update(1)
    served.engine.wrong = (2,)
    error = await refuses(served.update(2), Reason.CANARY_FAILED)
    assert error.metadata["policy_version"] == "1" and served.deployment.canary_difference == 1.0
    assert await served.passes() == 1 and "version 2" in served.deployment.problem
    assert served.states() == {2: VersionState.REFUSED, 1: VersionState.SERVING, 0: VersionState.KEPT}


async def test_calls_are_refused_with_the_reason(served: Served) -> None:
    await served.update(1)
    updating = await served.checking(2)
    waiting = asyncio.create_task(served.passes())
    served.engine.wrong = (1, 2)
    served.engine.judge.set()
    await refuses(updating, Reason.CANARY_FAILED)
    for call in (waiting, served.passes()):
        error = await refuses(call, Reason.POLICY_REFUSED)
        assert "version 2" in error.message and "version 1 cannot be served" in error.message
    assert served.deployment.state is PolicyState.REFUSED and not served.deployment.healthy
    await served.update(3)
    assert await served.passes() == 3 and served.deployment.problem == ""


async def test_without_engines_calls_are_told_to_come_again(served: Served) -> None:
    served.engine.info = ReplicaInfo("", False, problem="away")
    assert served.deployment.state is PolicyState.UNAVAILABLE and served.deployment.problem == "away"
    error = await refuses(served.passes(), Reason.ENGINE_UNAVAILABLE)
    assert error.retry_after is not None
    served.engine.info = ReplicaInfo("", True)
    assert await served.passes() == 0
    assert served.deployment.state is PolicyState.SERVING  # type: ignore[comparison-overlap]  # it has changed by now


async def test_what_unverified_weights_sampled_is_not_answered(served: Served) -> None:
    old = [VersionSpan(0, 5)]
    mixed = [VersionSpan(0, 2), VersionSpan(1, 3)]
    verified = served.deployment.verified
    updating = await served.checking(1)
    assert await verified(old)  # what was checked before needs no waiting
    waiting = asyncio.create_task(verified(mixed))
    await settle()
    assert not waiting.done()
    served.engine.judge.set()
    assert await waiting
    await updating
    served.engine.wrong = (2,)
    updating = await served.checking(2)
    refused = asyncio.create_task(verified([VersionSpan(2, 1)]))
    await settle()
    assert not refused.done(), "to sample again there must be weights that serve"
    served.engine.judge.set()
    await refuses(updating, Reason.CANARY_FAILED)
    assert not await refused
    served.engine.wrong = (1, 3)
    await refuses(served.update(3), Reason.CANARY_FAILED)
    assert await verified(old)
    await refuses(verified(mixed), Reason.POLICY_REFUSED)
