"""Gradients: a learner answers as one that carries out each of its calls once.

Its own answers do not show whether a repeated call added its gradient twice. So its model is a learner that is given
the same calls, as the model of an episode is the environment. A model follows a learner from its creation on; where it
cannot know in which state a checkpoint was loaded, it waits for the next one.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isclose, isnan
from typing import Protocol

from mulligan.testing.judge.history import BrokenRule, RecordedCall, named

RULE = "learner"
_CALLS = ("CreateLearner", "LoadCheckpoint", "ForwardBackward", "OptimStep", "SaveCheckpoint")
# Those that do not say what was computed, but how, or that change with the last digit of another.
_LEFT_OUT = frozenset({"computed_tokens", "grad_clipped"})
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4  # of float32 sums, as other machines add them up


class LearnerModel(Protocol):
    def forward_backward(self, request: bytes) -> Mapping[str, float]: ...

    def optim_step(self) -> Mapping[str, float]: ...

    def save(self, name: str) -> None: ...

    def load(self, name: str) -> None: ...


MakeLearner = Callable[[bytes], LearnerModel]
"""Makes a model by the request that created a learner. All of them find each other's checkpoints."""


def check(calls: Sequence[RecordedCall], make: MakeLearner) -> Iterator[BrokenRule]:
    by_learner: dict[str, _Followed] = {}
    for call in named(calls, *_CALLS):
        learner_id = call.request["learner_id"]
        followed = by_learner.setdefault(learner_id, _Followed(make, learner_id))
        yield from followed.follow(call)


class _Followed:
    """A learner over all its lives. `_model` is None where its state is not known."""

    def __init__(self, make: MakeLearner, learner_id: str):
        self._make = make
        self._learner_id = learner_id
        self._model: LearnerModel | None = None
        self._created = ""  # by this request
        self._next = 1  # number of the next call
        self._saves = 0
        self._saved: dict[str, dict[str, int]] = defaultdict(dict)  # by checkpoint: the model's, with the next call

    def follow(self, call: RecordedCall) -> Iterator[BrokenRule]:
        if call.name == "SaveCheckpoint" and not call.refused:
            self._save(call)
        elif call.ok and call.answer is not None:
            if call.name == "CreateLearner":
                self._create(call.whole, call.answer["next_sequence"])
            elif call.name == "LoadCheckpoint":
                self._load(call.request["name"], call.answer.get("next_sequence", 0))
            elif call.name != "SaveCheckpoint" and call.request["sequence"] >= self._next:
                yield from self._carry_out(call, call.answer["metrics"])

    def _create(self, request: str, next_call: int) -> None:
        if next_call != 1:
            return  # it was there already
        is_new = self._model is not None and self._next == 1 and self._created == request
        if not is_new:  # nothing was asked of it since
            self._created, self._next = request, 1
            self._model = self._make(base64.b64decode(request)) if request else None

    def _save(self, call: RecordedCall) -> None:
        """A save without an answer may have been carried out, or not."""
        saved = self._saved[call.request["name"]]
        if call.ok:
            saved.clear()
        if self._model is not None:
            self._saves += 1
            name = f"{self._learner_id}-{self._saves}"
            self._model.save(name)
            saved[name] = self._next

    def _load(self, name: str, next_call: int) -> None:
        possible = [own for own, number in self._saved[name].items() if number == next_call]
        if len(possible) == 1 and self._model is not None:
            self._model.load(possible[0])
            self._next = next_call
        else:
            self._model = None

    def _carry_out(self, call: RecordedCall, answered: Mapping[str, float]) -> Iterator[BrokenRule]:
        number = call.request["sequence"]
        if self._model is None or number > self._next:
            self._model = None
            return
        self._next += 1
        if call.name == "OptimStep":
            wanted = self._model.optim_step()
        else:
            wanted = self._model.forward_backward(base64.b64decode(call.whole))
        if differing := _differing(answered, wanted):
            told = ", ".join(f"{name} {answered.get(name)} (not {wanted.get(name)})" for name in differing)
            yield BrokenRule(RULE, f"call {number} answered other numbers than each call once gives: {told}", (call,))
            self._model = None  # everything after it differs


def _differing(answered: Mapping[str, float], wanted: Mapping[str, float]) -> list[str]:
    names = (answered.keys() | wanted.keys()) - _LEFT_OUT
    return sorted(name for name in names if not _same(answered.get(name), wanted.get(name)))


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return (isnan(one) and isnan(other)) or isclose(one, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
