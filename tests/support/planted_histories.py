"""Bugs of `further_bugs` as they show in the history of a run that had none: what a service with the bug would have
answered, or stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mulligan.common.experience import Experience
from mulligan.common.reflections import StoredReflection
from mulligan.testing.judge.history import SEVERAL, RecordedCall
from mulligan.testing.judge.state import Final, ToldEvaluation


@dataclass(frozen=True, slots=True)
class Recorded:
    calls: Sequence[RecordedCall]
    final: Final

    def answering(self, name: str, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Recorded:
        """The answers to these calls are others."""
        calls = [
            replace(call, answer=dict(call.answer) | change(call.answer))
            if call.name == name and call.answer is not None
            else call
            for call in self.calls
        ]
        return replace(self, calls=calls)

    def asking(self, name: str, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Recorded:
        """These calls ask for something else, also within calls for several."""

        def changed(call: RecordedCall) -> RecordedCall:
            single, requests, _ = SEVERAL.get(call.name, ("", "", ""))
            if call.credential or name not in (call.name, single):
                return call
            if name == call.name:
                return replace(call, request=dict(call.request) | change(call.request))
            several = [one | change(one) for one in call.request[requests]]
            return replace(call, request=dict(call.request) | {requests: several})

        return replace(self, calls=[changed(call) for call in self.calls])

    def storing(self, change: Callable[[StoredReflection], StoredReflection]) -> Recorded:
        return replace(self, final=replace(self.final, entries=[change(one) for one in self.final.entries]))

    def showing(self, change: Callable[[Experience], Experience]) -> Recorded:
        return replace(self, final=replace(self.final, experiences=[change(one) for one in self.final.experiences]))

    def measuring(self, change: Callable[[ToldEvaluation], ToldEvaluation]) -> Recorded:
        return replace(self, final=replace(self.final, evaluations=[change(one) for one in self.final.evaluations]))


def rewards_stored_wrongly(recorded: Recorded) -> Recorded:
    return recorded.storing(lambda one: replace(one, provenance=replace(one.provenance, reward_after=0.75)))


def task_stored_wrongly(recorded: Recorded) -> Recorded:
    return recorded.storing(lambda one: replace(one, provenance=replace(one.provenance, task_id="another")))


def labels_lost(recorded: Recorded) -> Recorded:
    """They were asked for, and nobody stored them."""
    return recorded.asking("AddReflection", lambda _: {"key": "slippery ice", "tags": ["ice", "holes"]})


def sources_lost(recorded: Recorded) -> Recorded:
    return recorded.asking("AddReflection", lambda _: {"source_ids": ["another"]})


def lesson_with_another_reward(recorded: Recorded) -> Recorded:
    """The trainer writes it, so the memory has it and everybody reads it."""

    def of(message: Mapping[str, Any]) -> dict[str, Any]:
        return {"provenance": message["provenance"] | {"reward_before": 0.75}}

    def read(answer: Mapping[str, Any]) -> dict[str, Any]:
        return {"reflections": [one | of(one) for one in answer.get("reflections", ())]}

    written = recorded.asking("AddReflection", of).answering("QueryReflections", read)
    return written.storing(lambda one: replace(one, provenance=replace(one.provenance, reward_before=0.75)))


def same_reward_for_every_use(recorded: Recorded) -> Recorded:
    uses = {name: [replace(use, reward=0.25) for use in of] for name, of in recorded.final.uses.items()}
    told = recorded.asking(
        "ReportOutcome", lambda asked: {"outcomes": [one | {"reward": 0.25} for one in asked["outcomes"]]}
    )
    return replace(told, final=replace(told.final, uses=uses))


def evaluation_invented(recorded: Recorded) -> Recorded:
    return recorded.measuring(lambda one: replace(one, success=0.0, mean_reward=-7.0, attempts=99))


def evaluation_of_fewer_attempts(recorded: Recorded) -> Recorded:
    return recorded.measuring(lambda one: replace(one, attempts=0, excluded=1))


def entries_read_twice(recorded: Recorded) -> Recorded:
    """And their readers were shown each twice."""
    read = recorded.answering("QueryReflections", lambda answer: {"reflections": 2 * answer.get("reflections", [])})
    return read.showing(lambda one: replace(one, memory_entry_ids=2 * one.memory_entry_ids))


def entry_hidden_from_queries(recorded: Recorded) -> Recorded:
    """The latest one of each answer: no use leaves it out, and nobody was shown it."""
    answers = [call.answer for call in recorded.calls if call.name == "QueryReflections" and call.answer]
    hidden = {answer["reflections"][0]["reflection_id"] for answer in answers if answer.get("reflections")}

    def left_out_of(use: Mapping[str, Any]) -> str:
        left_out = str(use.get("left_out_id", ""))
        return "" if left_out in hidden else left_out

    def without(answer: Mapping[str, Any]) -> dict[str, Any]:
        found = [one for one in answer.get("reflections", ()) if one["reflection_id"] not in hidden]
        uses = [dict(use, left_out_id=left_out_of(use)) for use in answer.get("uses", ())]
        return {"reflections": found, "uses": uses}

    def blind(one: Experience) -> Experience:
        shown = tuple(identity for identity in one.memory_entry_ids if identity not in hidden)
        left_out = "" if one.memory_left_out_id in hidden else one.memory_left_out_id
        return replace(one, memory_entry_ids=shown, memory_left_out_id=left_out)

    return recorded.answering("QueryReflections", without).showing(blind)


HISTORIES: Mapping[Callable[[Recorded], Recorded], set[str]] = {
    rewards_stored_wrongly: {"memory"},
    task_stored_wrongly: {"memory"},
    labels_lost: {"memory"},
    sources_lost: {"memory"},
    lesson_with_another_reward: {"rewards"},
    same_reward_for_every_use: {"rewards"},
    evaluation_invented: {"evaluations"},
    evaluation_of_fewer_attempts: {"evaluations"},
    entries_read_twice: {"memory"},
    entry_hidden_from_queries: {"memory"},
}
"""With the rules that have to find them, and no others."""
