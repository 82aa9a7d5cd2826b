"""Learners: each numbered call is carried out once, and each training step is in the run's journal and events once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mulligan.testing.judge.history import BrokenRule, RecordedCall, named
from mulligan.testing.judge.state import Final

RULE = "learner"
_CALLS = ("CreateLearner", "LoadCheckpoint", "ForwardBackward", "OptimStep", "SaveCheckpoint", "DeleteLearner")
_State = tuple[int, int]  # number of the next call, optimizer steps


@dataclass
class _Life:
    """Of a learner, from its creation to the loss of its server. Its client makes one call at a time."""

    next: int = 1
    steps: int = 0
    answered: dict[int, RecordedCall] = field(default_factory=dict)  # by their numbers
    saved: dict[str, set[_State]] = field(default_factory=lambda: defaultdict(set))  # in all lives

    def goes_on(self, next_: int, steps: int) -> None:
        self.next, self.steps = next_, steps
        self.answered.clear()


def check(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    by_learner: dict[str, list[RecordedCall]] = defaultdict(list)
    for call in named(calls, *_CALLS):
        by_learner[call.request["learner_id"]].append(call)
    for learner_id, of in by_learner.items():
        life = _Life()
        for call in of:
            yield from _follow(life, call)
        if final.learner is not None and learner_id == final.run_id:
            left = (final.learner.next_sequence, final.learner.optimizer_steps)
            possible = life.saved[final.learner.name]
            if left not in possible:
                what = f"{final.learner.name} has (next call, optimizer steps) {left}, not of {sorted(possible)}"
                saves = [call for call in of if call.request.get("name") == final.learner.name]
                yield BrokenRule(RULE, what, tuple(saves))
    yield from _check_run(final)


def _follow(life: _Life, call: RecordedCall) -> Iterator[BrokenRule]:
    if call.name == "CreateLearner" and call.ok and call.answer:
        if call.answer["next_sequence"] == 1:
            life.goes_on(1, 0)
        elif call.answer["next_sequence"] != life.next:
            yield BrokenRule(RULE, f"{call.answer['next_sequence']} calls were counted, not {life.next}", (call,))
    elif call.name == "LoadCheckpoint" and call.ok and call.answer:
        loaded = (call.answer.get("next_sequence", 0), call.answer.get("optimizer_steps", 0))
        possible = life.saved[call.request["name"]]
        if loaded not in possible:
            yield BrokenRule(RULE, f"loaded {loaded}, saved was one of {sorted(possible)}", (call,))
        life.goes_on(*loaded)
    elif call.name == "SaveCheckpoint" and not call.refused:
        if call.ok:
            life.saved[call.request["name"]] = {(life.next, life.steps)}
        else:
            life.saved[call.request["name"]].add((life.next, life.steps))
    elif call.name in ("ForwardBackward", "OptimStep"):
        yield from _numbered(life, call)


def _numbered(life: _Life, call: RecordedCall) -> Iterator[BrokenRule]:
    number = call.request["sequence"]
    if call.reason == "SEQUENCE_MISMATCH":
        yield BrokenRule(RULE, f"call {number} was refused, and {life.next} is next", (call,))
    if not call.ok or call.answer is None:
        return
    before = life.answered.get(number)
    if before is not None:
        if (before.digest, before.answer_digest) != (call.digest, call.answer_digest):
            yield BrokenRule(RULE, f"call {number} was answered twice, in two ways", (before, call))
        return
    if number != life.next:
        yield BrokenRule(RULE, f"call {number} was carried out, and {life.next} is next", (call,))
    life.answered[number] = call
    life.next = number + 1
    if call.name == "OptimStep" and not call.answer["metrics"].get("skipped", 0.0):
        life.steps += 1


def _check_run(final: Final) -> Iterator[BrokenRule]:
    """Each step once: its experiences, its end in the journal, its metrics among the events."""
    numbers = [number for number, _ in final.events]
    if numbers != sorted(set(numbers)):
        yield BrokenRule(RULE, "events do not count upwards")
    events = Counter(step for _, step in final.events if step is not None)
    ids = Counter(experience.experience_id for experience in final.experiences)
    twice = [one for one, count in ids.items() if count > 1]
    if twice:
        yield BrokenRule(RULE, f"experiences that are there twice: {twice[:4]}")
    of_step = Counter(experience.step for experience in final.experiences)
    for step in range(final.steps):
        if events[step] != 1:
            yield BrokenRule(RULE, f"step {step} has {events[step]} events")
        if final.completions.get(step, 0) != 1:
            yield BrokenRule(RULE, f"step {step} has {final.completions.get(step, 0)} ends in the journal")
        if of_step[step] != final.chains:
            yield BrokenRule(RULE, f"step {step} has {of_step[step]} experiences, not {final.chains}")
