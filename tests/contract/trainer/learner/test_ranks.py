"""A learner server of two processes, over gRPC: the same answers, the same errors, and what dies comes back."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from mulligan.cli.local import free_ports
from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, Reason
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from mulligan.trainer.client import LearnerAdminClient
from mulligan.trainer.data import Datum
from mulligan.trainer.learner.client import LearnerClient
from mulligan.trainer.learner.learner import Learner
from tests.support.failing_objective import Failing
from tests.support.learning import PLAIN, many, sampled, server_settings, spec
from tests.support.processes import runs
from tests.support.ranks import pids
from tests.support.tiny_model import write_tiny_model
from tests.support.waiting import until, until_async


class Served(NamedTuple):
    service: ServiceProcess
    folder: Path
    tiny: Path

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.service.address, outage_seconds=200)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[LearnerClient]:
        client = await LearnerClient.create(self.endpoint, "learner", "run", spec(self.tiny))
        try:
            yield client
        finally:
            await client.close()


@pytest.fixture(scope="module")
def served(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("ranks")
    service = shared_services.start(
        "trainer",
        address=f"127.0.0.1:{free_ports()['trainer']}",
        start_seconds=300,
        learner_processes=2,
        microbatch_tokens=100,
        threads=1,
        runs_folder=folder / "runs",
        checkpoint_folder=folder / "checkpoints",
        weights_folder=folder / "weights",
        models_folder=folder,
    )
    return Served(service, folder, write_tiny_model(folder / "tiny"))


@pytest.fixture
def local(served: Served, tmp_path: Path) -> Learner:
    return Learner("local", spec(served.tiny), server_settings(tmp_path))


@pytest.mark.timeout(600)
async def test_two_processes_answer_as_one(served: Served, local: Learner) -> None:
    async with served.client() as client:
        assert len(pids(served.service)) == 2
        data = many(9)
        for _ in range(2):
            expected = local.forward_backward(data, PLAIN)
            found = await client.forward_backward(data, PLAIN)
            assert found.pop("computed_tokens") >= expected.pop("computed_tokens")
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert await client.optim_step() == pytest.approx(local.optim_step(), rel=1e-4)
        for log_probs, wanted in zip(await client.forward(data), local.forward(data), strict=True):
            assert log_probs == pytest.approx(wanted, abs=1e-4)
        assert await client.forward([]) == [] and await client.forward_backward([], PLAIN) == {}
        assert (await client.optim_step())["skipped"] == 1


@pytest.mark.timeout(600)
async def test_errors_are_those_of_one_process_and_the_processes_go_on(served: Served) -> None:
    before = pids(served.service)
    with pytest.raises(DomainError) as caught:
        await LearnerClient.create(served.endpoint, "learner", "run", spec(Path("/nowhere")))
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
    async with served.client() as client:
        with pytest.raises(DomainError) as caught:
            await client.forward_backward([sampled(), sampled("culprit", tokens=(2, 3, 4, 5, 999))], PLAIN)
        assert caught.value.metadata["field"] == "data[1].token_ids[4]"
        with pytest.raises(DomainError) as caught:
            await client.load_checkpoint("none")
        assert caught.value.reason is Reason.CHECKPOINT_NOT_FOUND
        await client.save_checkpoint("one")
        limit = resource.prlimit(before[0], resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        for call in (client.save_checkpoint("two"), client.publish_weights(1)):
            with pytest.raises(DomainError) as caught:
                await call
            assert caught.value.reason is Reason.DISK_FULL
        resource.prlimit(before[0], resource.RLIMIT_FSIZE, limit)
        for path in (served.folder / "checkpoints" / "learner" / "one").glob("weights-*"):
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        with pytest.raises(DomainError) as caught:
            await client.load_checkpoint("one")
        assert caught.value.reason is Reason.CHECKPOINT_MISMATCH
        await client.save_checkpoint("two")
        assert (await client.forward_backward([sampled()], PLAIN))["tokens"] == 2
        assert (await client.optim_step())["skipped"] == 0
    assert pids(served.service) == before


@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.long)])
async def test_a_killed_process_costs_no_more_than_what_was_not_saved(
    served: Served, local: Learner, victim: int
) -> None:
    async with served.client() as client:
        for step in range(2):
            await client.forward_backward(many(6, seed=step), PLAIN)
            await client.optim_step()
            local.forward_backward(many(6, seed=step), PLAIN)
            local.optim_step()
        await client.save_checkpoint("two")
        long = asyncio.create_task(client.forward_backward(many(3000), PLAIN))

        admin = LearnerAdminClient(served.endpoint)

        async def begun() -> bool:
            return [one.idle for one in await admin.list()] == [0.0]

        await until_async(begun)
        await admin.close()
        os.kill(pids(served.service)[victim], signal.SIGKILL)
        with pytest.raises(DomainError) as caught:
            await long
        assert caught.value.reason is Reason.UNKNOWN_LEARNER
    async with served.client() as client:
        await client.load_checkpoint("two")
        found = await client.forward_backward(many(6, seed=2), PLAIN)
        assert found["loss"] == pytest.approx(local.forward_backward(many(6, seed=2), PLAIN)["loss"], rel=1e-3)
        assert await client.optim_step() == pytest.approx(local.optim_step(), rel=1e-3)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [1, 0])
async def test_an_undeclared_error_in_one_process_ends_the_learner_in_all(served: Served, rank: int) -> None:
    async with served.client() as client:
        before = pids(served.service)
        mask = (False, True, True)
        failing = Datum("failing", (2, 3, 4), mask, 1.0, 1.0, Failing(float(rank)), "first")
        with pytest.raises(CallFailed, match="incident") as failed:
            await client.forward_backward([failing, failing], PLAIN)
        assert failed.value.code == "INTERNAL" and "planted" in served.service.log
    async with served.client() as client:
        assert (await client.forward_backward([sampled()], PLAIN))["tokens"] == 2
        after = pids(served.service)
    assert after.keys() == before.keys() and not set(after.values()) & set(before.values())


@pytest.mark.timeout(600)
async def test_the_processes_end_with_torchrun(served: Served) -> None:
    """The last to use the server: it is killed."""
    before = pids(served.service).values()
    assert len(before) == 2
    served.service.kill()
    await until(lambda: not any(runs(pid) for pid in before))
