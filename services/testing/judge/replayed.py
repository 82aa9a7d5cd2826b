"""A learner that carries out once what a run's learner was asked for: the model of `gradients.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.settings import LearnerServerSettings
from mulligan.trainer.learner.wire import data_from_proto, loss_from_proto, spec_from_proto
from mulligan.trainer.v1 import learner_service_pb2 as pb


class ReplayedLearner:
    """As the request says that created the run's. Its checkpoints go to the folder, where another finds them."""

    def __init__(self, folder: Path, created: bytes):
        spec = replace(spec_from_proto(pb.CreateLearnerRequest.FromString(created)), keep_checkpoints=0)
        settings = LearnerServerSettings(folder / "weights", folder / "checkpoints", threads=1)
        self._learner = Learner("replayed", spec, settings)

    def forward_backward(self, request: bytes) -> Mapping[str, float]:
        asked = pb.ForwardBackwardRequest.FromString(request)
        return self._learner.forward_backward(data_from_proto(asked.data), loss_from_proto(asked.loss))

    def optim_step(self) -> Mapping[str, float]:
        return self._learner.optim_step()

    def save(self, name: str) -> None:
        self._learner.save_checkpoint(name)

    def load(self, name: str) -> None:
        self._learner.load_checkpoint(name)
