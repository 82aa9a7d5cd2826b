"""Bugs in the services that the judge must find, one of each kind that it judges. They follow the promises of the
contracts, not the judge. Each replaces a function of a service in this process, so a service that is started by
`mulligan.testing.judge.launch --plugin tests.support.planted_bugs:NAME` has the bug."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from mulligan.common.errors import DomainError, Reason
from mulligan.common.types import Outcome

Patch = Callable[[object, str, Any], None]


def step_played_twice(patch: Patch) -> None:
    """The environment is given each action twice."""
    from mulligan.env.episodes import RunningStep

    play = RunningStep.call

    def call(self: RunningStep) -> Any:
        answer = play(self)
        return answer if answer.done else play(self)

    patch(RunningStep, "call", call)


def repeated_step_played_again(patch: Patch) -> None:
    """A step whose answer was lost is played again when it is asked for again."""
    from mulligan.env.episodes import EpisodeTable

    take = EpisodeTable._take

    def again(self: Any, request: Any, jobs: Any) -> Any:
        record = self._live.get(request.episode_id)
        if record is not None and len(record.answers) == request.step_index + 1:
            record.answers.pop()
            record.actions.pop()
        return take(self, request, jobs)

    patch(EpisodeTable, "_take", again)


def write_lost(patch: Patch) -> None:
    """The second of the memory's additions is answered and not stored."""
    from mulligan.memory.servicer import MemoryServicer
    from mulligan.memory.store import reflection_id
    from mulligan.memory.v1 import memory_service_pb2 as pb

    add = MemoryServicer._added
    seen: list[str] = []

    async def lose(self: Any, requests: Any, context: Any) -> Any:
        answers: list[Any] = []
        for request in requests:
            if request.request_id not in seen and not request.request_id.startswith("intruder"):  # these are refused
                seen.append(request.request_id)
            if request.request_id in seen[1:2]:
                identity = reflection_id(request.scope, request.request_id)
                answers.append(pb.AddReflectionResponse(reflection_id=identity, version=2))
            else:
                answers += await add(self, [request], context)
        return answers

    patch(MemoryServicer, "_added", lose)


def write_stored_twice(patch: Patch) -> None:
    """Each addition to the memory makes two entries."""
    from mulligan.memory.servicer import MemoryServicer
    from mulligan.memory.v1 import memory_service_pb2 as pb

    add = MemoryServicer._added

    async def twice(self: Any, requests: Any, context: Any) -> Any:
        again = pb.AddReflectionsRequest(reflections=requests).reflections
        for request in again:
            request.request_id += "-again"
        await add(self, again, context)
        return await add(self, requests, context)

    patch(MemoryServicer, "_added", twice)


def report_counted_twice(patch: Patch) -> None:
    """The answer to a report says twice what it counted."""
    from mulligan.memory.servicer import MemoryServicer

    report = MemoryServicer.ReportOutcome

    async def twice(self: Any, request: Any, context: Any) -> Any:
        answer = await report(self, request, context)
        answer.counted *= 2
        return answer

    patch(MemoryServicer, "ReportOutcome", twice)


def version_of_the_future(patch: Patch) -> None:
    """Tokens bear the version that comes after the one that sampled them."""
    _wrong_version(patch, 1)


def version_of_the_past(patch: Patch) -> None:
    """Tokens bear the version before the one that sampled them."""
    _wrong_version(patch, -1)


def _wrong_version(patch: Patch, by: int) -> None:
    from mulligan.policy import servicer, wire

    convert = wire.completions_to_proto

    def wrong(*arguments: Any, **keywords: Any) -> Any:
        answer = convert(*arguments, **keywords)
        for completion in answer.completions:
            for span in completion.policy_versions:
                span.policy_version = max(0, span.policy_version + by)
        return answer

    patch(servicer, "completions_to_proto", wrong)


def failure_is_reward_zero(patch: Patch) -> None:
    """An episode that the infrastructure lost counts as one that failed."""
    from mulligan.trainer import harness, trainable

    usable = trainable.with_usable_reward

    def zero(sample: Any) -> Any:
        if not sample.outcome.has_reward:
            sample = replace(sample, outcome=Outcome.COMPLETED, reward=0.0, error="")
        return usable(sample)

    patch(harness, "with_usable_reward", zero)


def optimizer_step_counted_twice(patch: Patch) -> None:
    """An optimizer step that is asked for again is taken again."""
    from mulligan.trainer.learner import servicer

    once = servicer.LearnerServicer._exactly_once

    async def twice(self: Any, request: Any, context: Any) -> Any:
        held = self._held.get(request.learner_id)
        if type(request).__name__ == "OptimStepRequest" and held and request.sequence == held.next_call - 1:
            held.last_request = b""
            held.next_call -= 1
        return await once(self, request, context)

    patch(servicer.LearnerServicer, "_exactly_once", twice)


def token_not_checked(patch: Patch) -> None:
    """Who sends any token at all may do everything."""
    _careless(patch, lambda refusal, metadata: "authorization" in metadata)


def role_not_checked(patch: Patch) -> None:
    """A role is as good as any other, once in a while."""
    refused = itertools.count(1)
    _careless(patch, lambda refusal, _: refusal.reason is Reason.INSUFFICIENT_ROLE and next(refused) % 2 == 0)


def credential_of_any_run_counts(patch: Patch) -> None:
    """A run's credential lets its holder write to the memory of every run, once in a while."""
    from mulligan.common.run_credentials import RunGuard

    problem = RunGuard._problem
    asked = itertools.count(1)

    def careless(self: RunGuard, context: Any, needed: Any) -> str:
        found = problem(self, context, needed)
        return "" if "is for" in found and next(asked) % 2 == 0 else found

    patch(RunGuard, "_problem", careless)


def learner_without_credential(patch: Patch) -> None:
    """A trainer's token is enough to save the checkpoints of a learner, and to have it compute."""
    from mulligan.common.run_credentials import RunGuard
    from mulligan.trainer.learner.servicer import LearnerServicer

    use = LearnerServicer._with_learner
    check = RunGuard.check_learner
    open_to_all: ContextVar[bool] = ContextVar("open_to_all", default=False)

    async def careless(self: Any, request: Any, *arguments: Any, **keywords: Any) -> Any:
        open_to_all.set(type(request).__name__ in ("ForwardRequest", "SaveCheckpointRequest"))
        return await use(self, request, *arguments, **keywords)

    def checked(self: RunGuard, context: Any, learner_id: str) -> None:
        if not open_to_all.get():
            check(self, context, learner_id)

    patch(LearnerServicer, "_with_learner", careless)
    patch(RunGuard, "check_learner", checked)


def _careless(patch: Patch, forgives: Callable[[DomainError, Mapping[str, Any]], bool]) -> None:
    """Lets calls through that should be refused, by the refusal and the call's metadata."""
    from mulligan.common import server

    identify = server.RequestInterceptor._identify

    def careless(self: Any, method: str, needed: Any, context: Any) -> str:
        try:
            return identify(self, method, needed, context)
        except DomainError as refusal:
            if forgives(refusal, dict(context.invocation_metadata() or ())):
                return ""
            raise

    patch(server.RequestInterceptor, "_identify", careless)


HAS = {
    "step_played_twice": "env",
    "repeated_step_played_again": "env",
    "write_lost": "memory",
    "write_stored_twice": "memory",
    "report_counted_twice": "memory",
    "version_of_the_future": "policy",
    "version_of_the_past": "policy",
    "failure_is_reward_zero": "trainer",
    "optimizer_step_counted_twice": "trainer",
    "token_not_checked": "memory",
    "role_not_checked": "policy",
    "credential_of_any_run_counts": "memory",
    "learner_without_credential": "trainer",
}
"""The service that has the bug, by its name."""

BUGS: dict[str, Callable[[Patch], None]] = {name: globals()[name] for name in HAS}
