"""Weights that are not what the trainer published never serve, whatever the engine says: a policy service over gRPC,
with the real transformers backend, which is made to load something else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import generate_latest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import (
    CallOptions,
    CanaryProbe,
    PolicyState,
    PublishedWeights,
    SamplingParams,
    VersionState,
)
from mulligan.common.metrics import REGISTRY, collected
from mulligan.common.server import serve
from mulligan.models.build import build_model, write_untrained
from mulligan.policy.backend import Backend
from mulligan.policy.client import PolicyClient
from mulligan.policy.config import PolicySettings
from mulligan.policy.model_settings import ModelSettings
from mulligan.policy.policies import Policies
from mulligan.policy.servicer import add_to_server, health
from mulligan.testing.weights import full_weights, load, plain_log_probs
from tests.support.faulty import Fault, FaultyBackend, changed, corrupted, previous, skipped, swapped
from tests.support.metrics import sample

PROMPT = list(range(7, 37))
PROBE_IDS = (list(range(7, 37)), [5, *range(200, 180, -1)])
SERVICE = "mulligan.policy.v1.PolicyService"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("model"))


@dataclass
class Faulty:
    """A running service, its engine, and the trainer's side of it."""

    client: PolicyClient
    address: str
    backend: FaultyBackend
    model: Path
    folder: Path  # weights
    logged: Sequence[MutableMapping[str, Any]]  # it grows
    models: dict[int, torch.nn.Module] = field(default_factory=dict)

    def published(self, version: int, weights: torch.nn.Module, *, probes: bool = True) -> PublishedWeights:
        self.models[version] = weights
        described = full_weights(
            self.folder / f"{version}.safetensors", weights.state_dict(), version, self.backend.model.fingerprint
        )
        canary = tuple(CanaryProbe(tuple(ids), tuple(plain_log_probs(weights, ids))) for ids in PROBE_IDS)
        return replace(described, canary=canary if probes else ())

    async def update(self, version: int, weights: torch.nn.Module, **options: bool) -> float | None:
        return await self.client.update_weights(self.published(version, weights, **options))

    async def serves(self, version: int, problem: str = "") -> None:
        """This version answers, with the log-probabilities of its model."""
        params = SamplingParams(max_tokens=6, seed=1)
        completion = await self.client.generate(PROMPT, params, CallOptions(min_policy_version=version))
        expected = plain_log_probs(self.models[version], [*PROMPT, *completion.token_ids])[len(PROMPT) - 1 :]
        assert completion.log_probs == pytest.approx(expected, abs=1e-4)
        assert [span.policy_version for span in completion.policy_versions] == [version]
        info = await self.client.info()
        assert (info.policy_version, info.state) == (version, PolicyState.SERVING)
        assert problem in info.problem if problem else info.problem == ""

    async def states(self) -> dict[int, VersionState]:
        return {version.policy_version: version.state for version in await self.client.versions()}

    async def health(self) -> list[str]:
        """Of the whole, of the policy service, and of this policy."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            names = ["", SERVICE, f"{SERVICE}/actor"]
            answers = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in names]
        return [health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) for answer in answers]

    def errors(self, event: str) -> list[MutableMapping[str, Any]]:
        return [entry for entry in self.logged if entry["event"] == event and entry["log_level"] == "error"]


def metric(name: str, **labels: str) -> float:
    text = generate_latest(REGISTRY).decode()
    return sample(text, f"mulligan_policy_{name}", policy="actor", **labels) or 0.0


@pytest.fixture
async def faulty(model: Path, tmp_path: Path) -> AsyncIterator[Faulty]:
    folder = tmp_path / "weights"
    folder.mkdir()
    plain = {"model": str(model), "threads": 1, "context_length": 128, "weights_folder": folder}
    settings = PolicySettings.model_validate(plain)
    backends: list[FaultyBackend] = []

    async def create(settings: ModelSettings, folder: Path, first_version: int) -> Backend:
        backends.append(FaultyBackend(settings, first_version))
        return backends[0]

    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def begin(address: str) -> None:
        started.set_result(address)

    policies = await Policies.open(settings, create)
    with structlog.testing.capture_logs() as logged, collected(policies):
        service = asyncio.create_task(
            serve(
                settings,
                lambda server: add_to_server(server, policies),
                health_of_parts=lambda: health(policies),
                on_started=begin,
            )
        )
        client = PolicyClient(Endpoint(await started, outage_seconds=0), timeout=30)
        yield Faulty(client, started.result(), backends[0], model, folder, logged)
        await client.close()
        service.cancel()
        await asyncio.gather(service, return_exceptions=True)
    await policies.close()


async def canary_fails(call: Any) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await call
    assert caught.value.reason is Reason.CANARY_FAILED, str(caught.value)
    return caught.value


class TestEachFaultIsCaught:
    @pytest.mark.parametrize("name", ["corrupted", "swapped", "skipped", "previous"])
    async def test_by_log_probabilities(self, faulty: Faulty, tmp_path: Path, name: str) -> None:
        faults: dict[str, Fault] = {
            "corrupted": changed(tmp_path, corrupted),
            "swapped": changed(tmp_path, swapped),
            "skipped": skipped,
            "previous": previous,
        }
        difference = await faulty.update(1, build_model(1))
        assert difference is not None and difference < 1e-4
        await faulty.update(2, build_model(2))
        failures = metric("canary_failures_total")
        faulty.backend.faults = [faults[name]]
        error = await canary_fails(faulty.update(3, build_model(3)))
        assert error.metadata["policy_version"] == "2" and error.metadata["tolerance"] == "0.001"
        assert float(error.metadata["difference"]) > 1e-3
        await faulty.serves(2, "version 3")
        assert await faulty.health() == ["SERVING"] * 3
        assert await faulty.states() == {
            3: VersionState.REFUSED,
            2: VersionState.SERVING,
            1: VersionState.KEPT,
            0: VersionState.KEPT,
        }
        [entry] = faulty.errors("canary failed")
        assert (entry["policy"], entry["policy_version"]) == ("actor", 3)
        assert metric("canary_failures_total") == failures + 1
        assert metric("canary_difference") == pytest.approx(float(error.metadata["difference"]))
        assert metric("version") == 2
        with pytest.raises(DomainError) as caught:  # for good, though the engine would take it now
            await faulty.update(3, build_model(3))
        assert caught.value.reason is Reason.VERSION_CONFLICT and "refused" in caught.value.message
        await faulty.update(4, build_model(3))
        await faulty.serves(4)

    async def test_a_small_step_that_is_skipped_by_the_checksum(self, faulty: Faulty) -> None:
        """Log-probabilities agree within the tolerance: only the engine's own checksum tells."""
        await faulty.update(1, build_model(1))
        small = build_model(1)
        with torch.no_grad():
            small.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1 + 1e-6)
        assert (
            full_weights(faulty.folder / "x", small.state_dict(), 2, "f").sha256
            != faulty.published(1, build_model(1)).sha256
        )
        for probes in (True, False):
            version = 3 if probes else 4
            faulty.backend.faults = [skipped]
            error = await canary_fails(faulty.update(version, small, probes=probes))
            assert set(error.metadata) == {"checksum", "policy_version"} and "that is version 1" in error.message
        await faulty.serves(1, "version 4")
        assert await faulty.update(5, small) is not None
        await faulty.serves(5)

    async def test_the_first_step_that_is_skipped(self, faulty: Faulty) -> None:
        """What a trainer publishes first is often what the model came with, so the checksum alone says nothing."""
        original = load(faulty.model)
        await faulty.update(1, original)
        await faulty.serves(1)
        small = load(faulty.model)
        with torch.no_grad():
            small.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1 + 1e-6)
        faulty.backend.faults = [skipped]
        await canary_fails(faulty.update(2, small))
        await faulty.client.rollback(0)
        faulty.backend.faults = [skipped]
        await canary_fails(faulty.update(3, small))


async def test_no_call_is_answered_by_refused_weights(faulty: Faulty, tmp_path: Path) -> None:
    await faulty.update(1, build_model(1))
    running = True
    answers = []
    answered = asyncio.Semaphore(0)

    async def call(number: int) -> None:
        count = 0
        while running:
            params = SamplingParams(max_tokens=1 + 3 * number, seed=count)
            answers.append(await faulty.client.generate(PROMPT, params))
            answered.release()
            count += 1

    callers = [asyncio.create_task(call(number)) for number in range(8)]
    for version in range(2, 8):
        faulty.backend.faults = [changed(tmp_path, corrupted if version % 2 else swapped)]
        await canary_fails(faulty.update(version, build_model(version)))
        for _ in range(16):  # calls go on
            await answered.acquire()
    running = False
    await asyncio.gather(*callers)
    for completion in answers:
        assert [span.policy_version for span in completion.policy_versions] == [1]
    for completion in answers[:: max(1, len(answers) // 50)]:
        expected = plain_log_probs(faulty.models[1], [*PROMPT, *completion.token_ids])[len(PROMPT) - 1 :]
        assert completion.log_probs == pytest.approx(expected, abs=1e-4)


async def test_when_the_version_before_fails_too_nothing_serves(faulty: Faulty, tmp_path: Path) -> None:
    await faulty.update(1, build_model(1))
    faulty.backend.faults = [skipped, changed(tmp_path, corrupted)]
    error = await canary_fails(faulty.update(2, build_model(2)))
    assert error.metadata["policy_version"] == "1"
    with pytest.raises(DomainError) as caught:
        await faulty.client.generate(PROMPT, SamplingParams(max_tokens=1))
    assert caught.value.reason is Reason.POLICY_REFUSED
    info = await faulty.client.info()
    assert info.state is PolicyState.REFUSED and "version 2" in info.problem and "version 1" in info.problem
    assert await faulty.health() == ["SERVING", "NOT_SERVING", "NOT_SERVING"]
    assert metric("state", state="refused") == 1 and metric("state", state="serving") == 0
    [entry] = faulty.errors("policy refused")
    assert entry["policy"] == "actor"
    # An update that fails leaves it as it is; one that succeeds, also of the same version, or a rollback mends it.
    faulty.backend.faults = [DomainError(Reason.ENGINE_UNAVAILABLE, "gone")]
    with pytest.raises(DomainError):
        await faulty.update(3, build_model(3))
    assert (await faulty.client.info()).state is PolicyState.REFUSED
    await faulty.client.update_weights(faulty.published(1, build_model(1)))
    await faulty.serves(1)
    assert await faulty.health() == ["SERVING"] * 3
    faulty.backend.faults = [skipped, changed(tmp_path, corrupted)]
    await canary_fails(faulty.update(4, build_model(2)))
    await faulty.client.rollback(0)
    faulty.models[0] = load(faulty.model)
    await faulty.serves(0)
    assert await faulty.health() == ["SERVING"] * 3


async def test_an_engine_that_is_away_for_a_moment_gets_the_version_before(faulty: Faulty) -> None:
    await faulty.update(1, build_model(1))
    away = DomainError(Reason.ENGINE_UNAVAILABLE, "restarting")
    faulty.backend.faults = [skipped, away]
    await canary_fails(faulty.update(2, build_model(2)))
    await faulty.serves(1, "version 2")


async def test_a_fault_of_the_backend_does_not_change_what_serves(faulty: Faulty) -> None:
    await faulty.update(1, build_model(1))
    faulty.backend.faults = [RuntimeError("out of memory")]
    with pytest.raises(Exception, match="RuntimeError, incident"):
        await faulty.update(2, build_model(2))
    await faulty.serves(1, "out of memory")
    await faulty.update(2, build_model(2))  # it was not refused
    await faulty.serves(2)


async def test_calls_wait_for_the_update_that_runs(faulty: Faulty) -> None:
    """Those that ask for its version, and those that do not."""
    held = asyncio.Event()
    go_on = asyncio.Event()
    load_weights = faulty.backend.update_weights

    async def slow(*arguments: Any) -> None:
        held.set()
        await go_on.wait()
        await load_weights(*arguments)

    faulty.backend.update_weights = slow  # type: ignore[assignment,method-assign]
    updating = asyncio.create_task(faulty.update(1, build_model(1)))
    await held.wait()
    assert (await faulty.client.info()).state is PolicyState.UPDATING
    assert await faulty.health() == ["SERVING"] * 3
    options = [CallOptions(), CallOptions(min_policy_version=1)]
    calls = [
        asyncio.create_task(faulty.client.generate(PROMPT, SamplingParams(max_tokens=2), each)) for each in options
    ]
    await asyncio.sleep(0.1)
    assert not any(call.done() for call in calls)
    updating.cancel()  # the caller goes; the update does not stop
    go_on.set()
    for completion in await asyncio.gather(*calls):
        assert [span.policy_version for span in completion.policy_versions] == [1]
    await faulty.serves(1)


async def test_probes_are_checked_before_anything_is_touched(faulty: Faulty) -> None:
    weights = faulty.published(1, build_model(1))
    for probe, name in (
        (CanaryProbe((1, 2, 3), (-1.0,)), "canary[0].log_probs"),
        (CanaryProbe((1, 9999), (-1.0,)), "canary[0].token_ids"),
        (CanaryProbe((1,), ()), "canary[0].token_ids"),
    ):
        with pytest.raises(DomainError) as caught:
            await faulty.client.update_weights(replace(weights, canary=(probe,)))
        assert caught.value.reason is Reason.INVALID_FIELD and caught.value.metadata["field"] == name
    assert faulty.backend.policy_version == 0
    wrong = replace(weights.canary[0], log_probs=tuple(value - 0.01 for value in weights.canary[0].log_probs))
    await canary_fails(faulty.client.update_weights(replace(weights, canary=(wrong,))))
