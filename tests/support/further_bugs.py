"""Further bugs for the judge, planted by somebody who had not read it. As those of `planted_bugs`.

It does not find two others: gradients that are added twice (answers of the learner do not show them;
`tests/contract/trainer/learner/test_service.py` does), and an entry that queries do not find although it is stored
(it does not know what a strategy has to find; `tests/support/stores.py` does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

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
    from mulligan.memory.servicer import MemoryServicer

    add = MemoryServicer._added

    async def half(self: Any, requests: Any, context: Any) -> Any:
        for request in requests:
            request.text = request.text[: max(1, len(request.text) // 2)]
        return await add(self, requests, context)

    patch(MemoryServicer, "_added", half)


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
    from mulligan.common import server
    from mulligan.common.access import needed_role

    patch(server, "needed_role", lambda method: None if method.endswith("/GetSnapshot") else needed_role(method))


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
    "gradient_added_twice": "trainer",
    "table_of_roles_is_too_kind": "policy",
}
"""The service that has the bug, by its name."""

BUGS: dict[str, Callable[[Patch], None]] = {name: globals()[name] for name in HAS}
