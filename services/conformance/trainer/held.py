"""The argument of the checks of a trainer, and a learner that a check creates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from google.protobuf.duration_pb2 import Duration

from mulligan.conformance.report import NotApplicable, Violation
from mulligan.conformance.target import CheckSession, Refusal
from mulligan.trainer.v1 import learner_service_pb2 as pb
from mulligan.trainer.v1 import run_config_pb2 as config_pb
from mulligan.trainer.v1 import run_service_pb2 as run_pb

OWNER = "conformance"
LEASE_SECONDS = 600  # of every learner, so that it is deleted even if the suite is killed


@dataclass(frozen=True, slots=True)
class TrainerOptions:
    """`model` is the model of learners, `config` the settings of runs, which start only with `writes`."""

    model: str = "embedded"
    writes: bool = False
    config: config_pb.RunConfig | None = None
    run_seconds: float = 600.0


class Trainer:
    def __init__(self, session: CheckSession, options: TrainerOptions) -> None:
        self.session = session
        self.options = options
        self.trained: run_pb.Run | None = None  # by `training.py`
        self.untrainable = ""

    async def clean_up(self) -> None:
        await self.session.clean_up()

    def may_write(self) -> None:
        if not self.options.writes:
            raise NotApplicable("it would leave something on the trainer's disk: --writes")

    def create_request(self, **changes: Any) -> pb.CreateLearnerRequest:
        given: dict[str, Any] = {
            "learner_id": f"conformance-{uuid4().hex}",
            "owner": OWNER,
            "seed": 7,
            "deterministic": True,
            "lease": Duration(seconds=LEASE_SECONDS),
        }
        return pb.CreateLearnerRequest(model=pb.ModelConfig(source=self.options.model), **(given | changes))

    @asynccontextmanager
    async def learner(self, **changes: Any) -> AsyncIterator[RemoteLearner]:
        """Creates a learner and deletes it afterwards. Raises NotApplicable if the trainer has no room for it."""
        request = self.create_request(**changes)
        ids = {"learner_id": request.learner_id, "owner": request.owner}
        self.session.later("DeleteLearner", pb.DeleteLearnerRequest(**ids))
        answer = await self.session.attempt("CreateLearner", request)
        if isinstance(answer, Refusal) and answer.reason == "CAPACITY_REACHED":
            raise NotApplicable(f"the trainer holds as many learners as it may: {answer.message}")
        if isinstance(answer, Refusal) and answer.reason == "MODEL_NOT_FOUND":
            raise NotApplicable(f"the trainer has no model {self.options.model!r} (--model)")
        if isinstance(answer, Refusal):
            raise Violation("a learner of this model", answer, request)
        yield RemoteLearner(self.session, request, answer)
        await self.session.ask("DeleteLearner", pb.DeleteLearnerRequest(**ids))


@dataclass(frozen=True, slots=True)
class RemoteLearner:
    session: CheckSession
    request: pb.CreateLearnerRequest
    created: pb.CreateLearnerResponse

    @property
    def ids(self) -> dict[str, Any]:
        return {"learner_id": self.request.learner_id, "owner": self.request.owner}

    async def state(self) -> pb.GetLearnerResponse:
        asked = pb.GetLearnerRequest(learner_id=self.request.learner_id)
        found: pb.GetLearnerResponse = await self.session.ask("GetLearner", asked)
        return found

    def forward(self, *data: pb.Datum) -> pb.ForwardRequest:
        return pb.ForwardRequest(data=data or [datum()], **self.ids)

    async def log_probs(self) -> list[float]:
        """The log-probabilities of the trained tokens of one datum, under the present weights."""
        answer = await self.session.ask("Forward", self.forward())
        return list(answer.log_probs[0].log_probs)

    def backward(self, sequence: int, *data: pb.Datum, **ids: str) -> pb.ForwardBackwardRequest:
        loss = pb.LossConfig(kl_coefficient=0.0)
        return pb.ForwardBackwardRequest(sequence=sequence, data=data or [datum()], loss=loss, **(self.ids | ids))

    def step(self, sequence: int, **ids: str) -> pb.OptimStepRequest:
        return pb.OptimStepRequest(sequence=sequence, **(self.ids | ids))

    async def learn(self, sequence: int) -> None:
        """Takes an optimizer step in two calls, with the numbers `sequence` and `sequence + 1`."""
        await self.session.ask("ForwardBackward", self.backward(sequence))
        await self.session.ask("OptimStep", self.step(sequence + 1))


def datum(name: str = "datum", advantage: float = 1.0, **changes: Any) -> pb.Datum:
    """Six tokens, of which the last three are trained on."""
    fields: dict[str, Any] = {
        "datum_id": name,
        "token_ids": [2, 3, 4, 5, 6, 7],
        "loss_mask": [False, False, False, True, True, True],
        "weight": 1.0,
        "temperature": 1.0,
        "policy_gradient": pb.PolicyGradient(advantage=advantage, rollout_log_probs=[-3.0, -3.0, -3.0]),
        "branch": "first",
    }
    return pb.Datum(**(fields | changes))
