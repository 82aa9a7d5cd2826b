"""An objective and a loss of another package train a real learner over gRPC; so do all that come along."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.status import from_rpc_error
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.learner.client import LearnerClient
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.wire import data_to_proto
from mulligan.trainer.losses import read_loss
from mulligan.trainer.v1 import learner_service_pb2 as pb
from mulligan.trainer.v1 import learner_service_pb2_grpc as pb_grpc
from tests.support.distribution import install
from tests.support.distribution.acme.unlikelihood import Unlikelihood
from tests.support.learning import PLAIN, many, sampled, server_settings, spec
from tests.support.tiny_model import write_tiny_model
from tests.unit.trainer.test_objective import DATA

MODULE = "tests.support.distribution.acme"
AVOIDED = replace(sampled(), objective=Unlikelihood(0.5, (1.0, 2.0)), branch="avoided")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def address(shared_services: ServiceProcesses, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a server that has the package, installed and as modules."""
    folder = tmp_path_factory.mktemp("server")
    path = [str(install(folder / "installed")), *filter(None, sys.path)]
    folders: dict[str, Any] = {"checkpoint-folder": folder / "checkpoints", "weights-folder": folder / "weights"}
    folders["models-folder"] = tiny.parent
    environment = {"PYTHONPATH": os.pathsep.join(path)}
    return shared_services.start("trainer", environment=environment, threads=1, **folders).address


@pytest.fixture
async def client(address: str, tiny: Path) -> AsyncIterator[LearnerClient]:
    client = await LearnerClient.create(Endpoint(address), "learner", "run", spec(tiny, deterministic=True))
    yield client
    await client.close()


async def test_of_another_package(client: LearnerClient, tiny: Path, tmp_path: Path) -> None:
    """By module path through the client, and by the names of the entry points."""
    local = Learner("local", spec(tiny, deterministic=True), server_settings(tmp_path / "local"))
    tilted = read_loss({"name": f"{MODULE}.tilted", "tilt": 0.25, "kl_coefficient": 0.1})
    probs = [math.exp(value) for value in local.forward([AVOIDED])[0]]
    data = [*many(5), AVOIDED]
    metrics = await client.forward_backward(data, tilted)
    assert metrics == local.forward_backward(data, tilted)
    assert metrics["avoided/loss"] == pytest.approx(-0.5 * (math.log1p(-probs[0]) + 2 * math.log1p(-probs[1])))
    assert metrics["avoided/avoided"] == pytest.approx(1 - sum(probs) / 2)
    assert "first/tilted" in metrics and "first/clip_fraction" not in metrics

    request = pb.ForwardBackwardRequest(learner_id="learner", owner="run", sequence=2, data=data_to_proto(data))
    request.loss.name = "tilted"
    request.loss.kl_coefficient = 0.1
    request.loss.settings["tilt"] = 0.25
    request.data[-1].custom.name = "unlikelihood"
    again = await client._stub.ForwardBackward(request)
    assert dict(again.metrics) == metrics
    local.forward_backward(data, tilted)
    client._next_call = 3
    assert await client.optim_step() == local.optim_step()
    assert await client.forward(data) == local.forward(data)


async def test_every_objective_that_comes_along(client: LearnerClient, tiny: Path, tmp_path: Path) -> None:
    local = Learner("local", spec(tiny, deterministic=True), server_settings(tmp_path / "local"))
    data = [replace(datum, branch=type(datum.objective).__name__) for datum in DATA]
    for name in ("ppo", "gspo", "cispo"):
        assert await client.forward_backward(data, read_loss({"name": name})) == local.forward_backward(
            data, read_loss({"name": name})
        )
    assert await client.optim_step() == local.optim_step()
    assert await client.forward(data) == local.forward(data)


async def test_what_is_unknown_is_named(client: LearnerClient) -> None:
    stub: pb_grpc.LearnerServiceStub = client._stub

    def request() -> pb.ForwardBackwardRequest:
        data = data_to_proto([sampled(), AVOIDED])
        return pb.ForwardBackwardRequest(learner_id="learner", owner="run", sequence=1, data=data)

    loss, setting, objective, length = (request() for _ in range(4))
    loss.loss.name = "tlted"
    setting.loss.settings["clip_hihg"] = 0.1
    objective.data[1].custom.name = "unlikelyhood"
    length.data[1].custom.token_values["shares"].values.append(1.0)
    for wrong, field, words in (
        (loss, "loss.name", "did you mean 'tilted'?"),
        (setting, "loss.clip_hihg", "did you mean 'clip_high'?"),
        (objective, "data[1].custom.name", "did you mean 'unlikelihood'?"),
        (length, 'data[1].custom.token_values["shares"]', "one value per trained token, 2; got 3"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ForwardBackward(wrong)
        error = from_rpc_error(caught.value)
        assert isinstance(error, DomainError) and error.reason is Reason.INVALID_FIELD
        assert error.metadata["field"] == field and words in error.message
    assert (await client.forward_backward([sampled()], PLAIN))["tokens"] == 2, "the sequence goes on"
