"""Callers of the learner service that vanish: a case for each call that changes or computes something."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mulligan.trainer.learner.servicer import LearnerServicer, add_to_server
from mulligan.trainer.learner.wire import data_to_proto, loss_to_proto
from mulligan.trainer.losses import ppo
from mulligan.trainer.v1 import learner_service_pb2 as pb
from mulligan.trainer.v1 import learner_service_pb2_grpc as pb_grpc
from tests.support.learning import sampled, server_settings
from tests.support.tiny_model import write_tiny_model
from tests.support.vanishing import Case, Vanishing, at_each_wait, vanishing
from tests.support.waiting import until

_IDS: dict[str, Any] = {"learner_id": "learner", "owner": "run"}


class _Learner:
    def __init__(self, folder: Path):
        self.folder = folder
        self.model = write_tiny_model(folder / "tiny")
        self.servicer = LearnerServicer(server_settings(folder))
        self.stub: pb_grpc.LearnerServiceStub
        self.sequence = 1
        self.number = 1  # of a checkpoint or a version

    def create(self) -> pb.CreateLearnerRequest:
        return pb.CreateLearnerRequest(model=pb.ModelConfig(source=str(self.model)), **_IDS)

    async def ids(self) -> list[str]:
        listed = await self.stub.ListLearners(pb.ListLearnersRequest())
        return [info.learner_id for info in listed.learners]

    async def idle(self) -> None:
        """No call holds the learner, so its lease can end."""
        [held] = self.servicer._held
        await until(lambda: held.calls == 0)

    async def next_sequence(self) -> int:
        return int((await self.stub.GetLearner(pb.GetLearnerRequest(learner_id="learner"))).next_sequence)


@asynccontextmanager
async def _serving(folder: Path, caller: Vanishing, *, create: bool = True) -> AsyncIterator[_Learner]:
    its = _Learner(folder)
    async with vanishing(lambda server: add_to_server(server, its.servicer), caller) as (_, channel):
        its.stub = pb_grpc.LearnerServiceStub(channel)
        if create:
            await its.stub.CreateLearner(its.create())
        yield its
    await its.servicer.close()


async def create_learner(folder: Path, caller: Vanishing) -> None:
    async def made(answer: Any) -> None:
        again = await its.stub.CreateLearner(its.create())
        assert await its.ids() == ["learner"] and (answer is None or answer == again)
        await its.idle()
        await its.stub.DeleteLearner(pb.DeleteLearnerRequest(**_IDS))
        assert await its.ids() == []

    async with _serving(folder, caller, create=False) as its:
        await at_each_wait(caller, lambda: its.stub.CreateLearner(its.create()), made)


async def delete_learner(folder: Path, caller: Vanishing) -> None:
    async def gone(answer: Any) -> None:
        await its.stub.DeleteLearner(pb.DeleteLearnerRequest(**_IDS))
        assert await its.ids() == []
        await its.stub.CreateLearner(its.create())

    async with _serving(folder, caller) as its:
        await at_each_wait(caller, lambda: its.stub.DeleteLearner(pb.DeleteLearnerRequest(**_IDS)), gone)


async def forward(folder: Path, caller: Vanishing) -> None:
    request = pb.ForwardRequest(data=data_to_proto([sampled()]), **_IDS)

    async def computed(answer: Any) -> None:
        again = await its.stub.Forward(request)
        assert len(again.log_probs) == 1 and (answer is None or answer == again)
        await its.idle()

    async with _serving(folder, caller) as its:
        await at_each_wait(caller, lambda: its.stub.Forward(request), computed)


def _forward_backward(its: _Learner) -> Any:
    data = data_to_proto([sampled()])
    loss = loss_to_proto(ppo.Settings(kl_coefficient=0.0))
    return its.stub.ForwardBackward(pb.ForwardBackwardRequest(sequence=its.sequence, data=data, loss=loss, **_IDS))


def _optim_step(its: _Learner) -> Any:
    return its.stub.OptimStep(pb.OptimStepRequest(sequence=its.sequence, **_IDS))


async def _numbered(call: Callable[[_Learner], Any], folder: Path, caller: Vanishing) -> None:
    """Calls that count once, by their number."""

    async def stepped(answer: Any) -> None:
        again = await call(its)
        assert answer is None or answer == again
        its.sequence += 1
        assert await its.next_sequence() == its.sequence
        await its.idle()

    async with _serving(folder, caller) as its:
        await at_each_wait(caller, lambda: call(its), stepped)


async def save_checkpoint(folder: Path, caller: Vanishing) -> None:
    def save() -> Any:
        return its.stub.SaveCheckpoint(pb.SaveCheckpointRequest(name=f"c{its.number}", **_IDS))

    async def saved(answer: Any) -> None:
        again = await save()
        assert answer is None or answer == again
        await its.stub.LoadCheckpoint(pb.LoadCheckpointRequest(name=f"c{its.number}", **_IDS))  # it is whole
        its.number += 1
        await its.idle()

    async with _serving(folder, caller) as its:
        await at_each_wait(caller, save, saved)
        _no_halves(folder / "checkpoints")


async def load_checkpoint(folder: Path, caller: Vanishing) -> None:
    """Which sets the number of the next call back."""

    def load() -> Any:
        return its.stub.LoadCheckpoint(pb.LoadCheckpointRequest(name="one", **_IDS))

    async def loaded(answer: Any) -> None:
        again = await load()
        assert again.next_sequence == await its.next_sequence() == 1 and (answer is None or answer == again)
        await _optim_step(its)
        await its.idle()

    async with _serving(folder, caller) as its:
        await its.stub.SaveCheckpoint(pb.SaveCheckpointRequest(name="one", **_IDS))
        await _optim_step(its)
        await at_each_wait(caller, load, loaded)


async def publish_weights(folder: Path, caller: Vanishing) -> None:
    def publish() -> Any:
        return its.stub.PublishWeights(pb.PublishWeightsRequest(policy_version=its.number, **_IDS))

    async def published(answer: Any) -> None:
        again = await publish()
        assert answer is None or answer == again
        its.number += 1
        await its.idle()

    async with _serving(folder, caller) as its:
        await at_each_wait(caller, publish, published)
        _no_halves(folder / "weights")


def _no_halves(folder: Path) -> None:
    names = [path.name for path in folder.rglob("*")]
    assert names and not [name for name in names if name.startswith((".", "tmp")) or name.endswith((".new", ".tmp"))]


_SERVICE = "/mulligan.trainer.v1.LearnerService/"
CASES: dict[str, Case] = {
    f"{_SERVICE}CreateLearner": create_learner,
    f"{_SERVICE}DeleteLearner": delete_learner,
    f"{_SERVICE}Forward": forward,
    f"{_SERVICE}ForwardBackward": partial(_numbered, _forward_backward),
    f"{_SERVICE}OptimStep": partial(_numbered, _optim_step),
    f"{_SERVICE}SaveCheckpoint": save_checkpoint,
    f"{_SERVICE}LoadCheckpoint": load_checkpoint,
    f"{_SERVICE}PublishWeights": publish_weights,
}
