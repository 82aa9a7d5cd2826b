"""Callers with the role that a call needs, but without the credential of the run: they try to write to its memory, and
to use its learner. What they send is well-formed, and as a call of the run's own would be."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from google.protobuf.message import Message

from mulligan.common.run_credentials import RunGrant, RunKeys
from mulligan.common.tokens import RUN_CREDENTIAL, bearer
from mulligan.memory.v1 import memory_service_pb2 as memory_pb
from mulligan.memory.v1 import memory_service_pb2_grpc as memory_grpc
from mulligan.testing.judge.access import NO_RUN, OTHER_RUN
from mulligan.trainer.data import Datum, PolicyGradient
from mulligan.trainer.learner.wire import data_to_proto, loss_to_proto
from mulligan.trainer.losses import ppo
from mulligan.trainer.v1 import learner_service_pb2 as learner_pb
from mulligan.trainer.v1 import learner_service_pb2_grpc as learner_grpc

MEMORY = "mulligan.memory.v1.MemoryService"
LEARNER = "mulligan.trainer.v1.LearnerService"
CREDENTIAL_SECONDS = 4 * 24 * 3600.0  # longer than clocks are apart: no credential of a judged run ends by itself
_SECONDS = 5.0  # of a look
_DATUM = Datum(
    "intruder", (2, 3, 4, 5), (False, False, True, True), 1.0, 1.0, PolicyGradient(1.0, (-1.0, -1.0)), "first"
)
_LOSS = ppo.Settings(kl_coefficient=0.0)
_LEARNER_CALLS: dict[str, Callable[[int], dict[str, Any]]] = {
    "CreateLearner": lambda _: {},
    "DeleteLearner": lambda _: {},
    "Forward": lambda _: {"data": data_to_proto([_DATUM])},
    "ForwardBackward": lambda sequence: {
        "sequence": sequence,
        "data": data_to_proto([_DATUM]),
        "loss": loss_to_proto(_LOSS),
    },
    "OptimStep": lambda sequence: {"sequence": sequence},
    "SaveCheckpoint": lambda _: {"name": "intruder"},
    "LoadCheckpoint": lambda _: {"name": "intruder"},
    "PublishWeights": lambda _: {"policy_version": 1_000_000},
}


class Intruders:
    """`token` is a trainer's; `keys` sign the credential of another run, which counts for that."""

    def __init__(self, run_id: str, token: str, keys: RunKeys, chance: random.Random):
        self._run_id = run_id
        self._chance = chance
        other = keys.sign(RunGrant("another-run", ("another-run",)), CREDENTIAL_SECONDS)
        role = tuple(bearer(token))
        self._metadata: Mapping[str, Any] = {NO_RUN: role, OTHER_RUN: (*role, (RUN_CREDENTIAL, other))}
        self._role = role
        self._made = 0

    def credential(self) -> tuple[str, Any]:
        """What a call has, as the history says it, and as metadata."""
        return self._chance.choice(list(self._metadata.items()))

    async def request(self, channel_of: Callable[[str], grpc.aio.Channel]) -> tuple[str, Message]:
        """A method and what it is asked for; `channel_of` takes the full name of a service."""
        self._made += 1
        if self._chance.random() < 0.5:
            return await self._of_memory(channel_of(MEMORY))
        return await self._of_learner(channel_of(LEARNER))

    async def _of_memory(self, channel: grpc.aio.Channel) -> tuple[str, Message]:
        entry, use = await self._found(memory_grpc.MemoryServiceStub(channel))
        possible: dict[str, Message] = {
            "AddReflection": memory_pb.AddReflectionRequest(
                request_id=f"intruder-{self._made}",
                scope=self._run_id,
                text="what an intruder says",
                provenance=memory_pb.Provenance(environment="frozenlake-3x3"),
            ),
            "QueryReflections": memory_pb.QueryReflectionsRequest(
                scope=self._run_id,
                environment="frozenlake-3x3",
                strategy=memory_pb.RETRIEVAL_STRATEGY_SIMILAR_WORDS,
                text="what",
                trial=memory_pb.Trial(use_keys=[f"intruder-{self._made}"]),
            ),
        }
        if entry:
            possible["DeleteReflection"] = memory_pb.DeleteReflectionRequest(reflection_id=entry)
            possible["ReviseReflection"] = memory_pb.ReviseReflectionRequest(
                reflection_id=entry, request_id=f"intruder-{self._made}", expected_revision=1, text="another text"
            )
        if use:
            outcome = memory_pb.UseOutcome(use_id=use, reward=1.0)
            possible["ReportOutcome"] = memory_pb.ReportOutcomeRequest(outcomes=[outcome])
        name = self._chance.choice(list(possible))
        return f"/{MEMORY}/{name}", possible[name]

    async def _found(self, stub: memory_grpc.MemoryServiceStub) -> tuple[str, str]:
        """The ids of an entry of the run, and of a use of it; every trainer may look for them."""
        entry = use = ""
        try:
            looking: dict[str, Any] = {"metadata": self._role, "timeout": _SECONDS}
            listed = await stub.ListReflections(memory_pb.ListReflectionsRequest(scope=self._run_id), **looking)
            if listed.reflections:
                entry = self._chance.choice(listed.reflections).reflection_id
                asked = memory_pb.ExplainReflectionRequest(reflection_id=entry)
                uses = (await stub.ExplainReflection(asked, **looking)).uses
                use = uses[0].use_id if uses else ""
        except grpc.aio.AioRpcError:  # the memory is away
            pass
        return entry, use

    async def _of_learner(self, channel: grpc.aio.Channel) -> tuple[str, Message]:
        owner, sequence = self._run_id, 1
        try:
            asked = learner_pb.GetLearnerRequest(learner_id=self._run_id)
            stub = learner_grpc.LearnerServiceStub(channel)
            found = await stub.GetLearner(asked, metadata=self._role, timeout=_SECONDS)
            owner, sequence = found.owner, found.next_sequence
        except grpc.aio.AioRpcError:  # it is not there yet, or away
            pass
        name = self._chance.choice(list(_LEARNER_CALLS))
        kind = getattr(learner_pb, f"{name}Request")
        request: Message = kind(learner_id=self._run_id, owner=owner, **_LEARNER_CALLS[name](sequence))
        return f"/{LEARNER}/{name}", request
