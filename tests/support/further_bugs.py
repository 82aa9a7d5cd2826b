"""Further bugs for the judge, planted by somebody who had not read it. As those of `planted_bugs`.

Of what queries find it knows LATEST_SUCCESS alone; `tests/support/stores.py` has the other strategies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from mulligan.common.types import Outcome
from tests.support.planted_bugs import Patch


def answer_of_another_episode(patch: Patch) -> None:
    """Now and then a step is answered with what another episode shows."""
    from mulligan.env import servicer

    fill = servicer._fill_step
    shown: list[str] = []

    def mixed(step: Any, answer: Any) -> None:
        fill(step, answer)
        shown.append(answer.observation)
        if len(shown) % 5 == 0:
            step.observation = next((other for other in reversed(shown) if other != answer.observation), "lost")

    patch(servicer, "_fill_step", mixed)


def reward_given_to_each_repetition(patch: Patch) -> None:
    """The answer to a repeated step has another reward than the first one had."""
    from mulligan.env import servicer

    fill = servicer._fill_step
    answered: set[int] = set()

    def other(step: Any, answer: Any) -> None:
        fill(step, answer)
        if id(answer) in answered:
            step.reward += 0.5
        answered.add(id(answer))

    patch(servicer, "_fill_step", other)


def text_cut(patch: Patch) -> None:
    """The memory keeps half of a text."""

    def cut(request: Any) -> None:
        request.text = request.text[: max(1, len(request.text) // 2)]

    _stored_otherwise(patch, cut)


def lost_episode_counts_as_cut(patch: Patch) -> None:
    """An episode that was lost with its server counts as one that its step limit ended, with reward 0."""
    from mulligan.trainer import harness, trainable

    usable = trainable.with_usable_reward

    def cut(sample: Any) -> Any:
        if not sample.outcome.has_reward:
            return replace(sample, outcome=Outcome.TRUNCATED, reward=0.0, error="")
        return usable(sample)

    patch(harness, "with_usable_reward", cut)


def snapshot_open_to_all(patch: Patch) -> None:
    """One call of the memory needs no credential."""
    from mulligan.common.callers import by_address
    from mulligan.common.server import RequestInterceptor

    identify = RequestInterceptor._identify

    def careless(self: Any, method: str, needed: Any, context: Any) -> Any:
        if method.endswith("/GetSnapshot"):
            return by_address(context.peer())
        return identify(self, method, needed, context)

    patch(RequestInterceptor, "_identify", careless)


def rewards_stored_wrongly(patch: Patch) -> None:
    """The memory stores an entry with other rewards, and of another task."""

    def change(request: Any) -> None:
        origin = request.provenance
        origin.reward_before, origin.reward_after, origin.success, origin.task_id = 0.0, 0.75, True, "another"

    _stored_otherwise(patch, change)


def labels_lost(patch: Patch) -> None:
    """The memory loses an entry's labels, and where it comes from."""

    def change(request: Any) -> None:
        request.key, request.kind = "", 2
        request.ClearField("tags")
        request.ClearField("source_ids")
        request.provenance.environment = request.provenance.run_id = "another"

    _stored_otherwise(patch, change)


def _stored_otherwise(patch: Patch, change: Callable[[Any], None]) -> None:
    from mulligan.memory.servicer import MemoryServicer

    add = MemoryServicer._added

    async def changed(self: Any, requests: Any, context: Any) -> Any:
        for request in requests:
            change(request)
        return await add(self, requests, context)

    patch(MemoryServicer, "_added", changed)


def lesson_with_another_reward(patch: Patch) -> None:
    """The trainer writes another reward to the memory than the attempt before a lesson had."""
    from mulligan.trainer.step import StepRunner

    origin = StepRunner._origin

    def wrong(self: Any, *arguments: Any) -> Any:
        return replace(origin(self, *arguments), reward_before=0.75)

    patch(StepRunner, "_origin", wrong)


def same_reward_for_every_use(patch: Patch) -> None:
    """The trainer reports the same reward for every use."""
    from mulligan.memory.client import MemoryClient

    report = MemoryClient.report

    async def same(self: Any, outcomes: Any) -> Any:
        return await report(self, [replace(one, reward=0.25) for one in outcomes])

    patch(MemoryClient, "report", same)


def evaluation_invented(patch: Patch) -> None:
    """Evaluations have numbers that nobody measured."""
    from mulligan.trainer import evaluations

    _evaluated_otherwise(patch, evaluations, success=0.0, mean_reward=-7.0, attempts=99, excluded=0)


def evaluation_of_fewer_attempts(patch: Patch) -> None:
    """Evaluations count their attempts as lost ones."""
    from mulligan.trainer import evaluations

    _evaluated_otherwise(patch, evaluations, attempts=0, excluded=1)


def _evaluated_otherwise(patch: Patch, module: object, **changes: Any) -> None:
    measure = module.measure  # type: ignore[attr-defined]

    async def other(*arguments: Any, **keywords: Any) -> Any:
        return msgspec.structs.replace(await measure(*arguments, **keywords), **changes)

    patch(module, "measure", other)


def entries_read_twice(patch: Patch) -> None:
    """A query answers each entry twice."""
    _found_otherwise(patch, lambda found: found * 2)


def entry_hidden_from_queries(patch: Patch) -> None:
    """The entry that a query should find first is stored, and not found."""
    _found_otherwise(patch, lambda found: found[1:])


def _found_otherwise(patch: Patch, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
    from mulligan.memory import retrieval, servicer

    retrieve = retrieval.retrieve

    async def changed(query: Any, store: Any) -> Any:
        found = await retrieve(query, store)
        return replace(found, reflections=change(tuple(found.reflections)))

    patch(servicer, "retrieve", changed)


def gradient_added_twice(patch: Patch) -> None:
    """A call that adds a gradient adds it again when it is asked for again."""
    from mulligan.trainer.learner import servicer

    once = servicer.LearnerServicer._exactly_once

    async def twice(self: Any, request: Any, context: Any) -> Any:
        held = self._held.get(request.learner_id)
        if type(request).__name__ == "ForwardBackwardRequest" and held and request.sequence == held.next_call - 1:
            held.last_request = b""
            held.next_call -= 1
        return await once(self, request, context)

    patch(servicer.LearnerServicer, "_exactly_once", twice)


def table_of_roles_is_too_kind(patch: Patch) -> None:
    """The table of roles lets readers make every call."""
    from mulligan.common import access

    def kind(needed: access.AccessRole | None) -> access.AccessRole | None:
        return access.AccessRole.READER if needed is not None else None

    table = {name: {call: kind(role) for call, role in calls.items()} for name, calls in access.ACCESS.items()}
    patch(access, "ACCESS", table)


HAS = {
    "answer_of_another_episode": "env",
    "reward_given_to_each_repetition": "env",
    "text_cut": "memory",
    "lost_episode_counts_as_cut": "trainer",
    "snapshot_open_to_all": "memory",
    "rewards_stored_wrongly": "memory",
    "labels_lost": "memory",
    "lesson_with_another_reward": "trainer",
    "same_reward_for_every_use": "trainer",
    "evaluation_invented": "trainer",
    "evaluation_of_fewer_attempts": "trainer",
    "entries_read_twice": "memory",
    "entry_hidden_from_queries": "memory",
    "gradient_added_twice": "trainer",
    "table_of_roles_is_too_kind": "policy",
}
"""The service that has the bug, by its name."""

BUGS: dict[str, Callable[[Patch], None]] = {name: globals()[name] for name in HAS}
