"""Rewards: each is what the environment answered, and what the infrastructure lost has none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mulligan.common.experience import Sample, Turn
from mulligan.common.rewards import total
from mulligan.common.types import Outcome
from mulligan.testing.judge.episodes import AnsweredStep, answered_steps, asked_steps
from mulligan.testing.judge.history import BrokenRule, RecordedCall, named
from mulligan.testing.judge.state import Final

RULE = "rewards"
_ENDS = {
    Outcome.COMPLETED: (1,),
    Outcome.TRUNCATED: (0, 1, 2),
}  # outcomes of the last step, as the contract numbers them


def check(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    steps = answered_steps(calls)
    asked = asked_steps(calls)
    for experience in final.experiences:
        for sample in experience.samples:
            if sample.is_episode and sample.forked_from is None:
                yield from _check_sample(sample, steps, asked)
    yield from _check_reports(calls, final)


def _check_sample(
    sample: Sample, steps: Mapping[str, Sequence[AnsweredStep]], asked: Mapping[str, set[int]]
) -> Iterator[BrokenRule]:
    name = f"{sample.sample_id} ({sample.outcome}, reward {sample.reward})"
    if (sample.reward is not None) != sample.outcome.has_reward:
        yield BrokenRule(RULE, f"{name}: a reward and its outcome do not go together")
        return
    if sample.reward is None:
        return
    if not sample.turns:
        yield BrokenRule(RULE, f"{name}: a reward without a step")
        return
    for number, turns in enumerate(sample.tries):
        episode_id = sample.episode_id if number == 0 else f"{sample.episode_id}-t{number}"
        yield from _check_try(name, turns, steps.get(episode_id, ()))
    last_id = sample.episode_id if len(sample.tries) == 1 else f"{sample.episode_id}-t{len(sample.tries) - 1}"
    last = [step for step in steps.get(last_id, ()) if step.index == len(sample.tries[-1]) - 1]
    for step in last[:1]:
        outcome = step.answer.get("outcome", 0) if step.done else 0
        if outcome not in _ENDS[sample.outcome]:
            yield BrokenRule(RULE, f"{name}: its last step had the outcome {outcome}", (step.call,))
    if len(sample.tries[-1]) in asked.get(last_id, ()):  # an episode that its limit ended is asked nothing more
        yield BrokenRule(RULE, f"{name}: its step {len(sample.tries[-1])} was asked for, and no answer counts")
    if abs(total(turn.reward for turn in sample.tries[-1]) - sample.reward) > 1e-9:
        yield BrokenRule(RULE, f"{name}: the rewards of its turns have another sum")


def _check_try(name: str, turns: Sequence[Turn], steps: Sequence[AnsweredStep]) -> Iterator[BrokenRule]:
    """Each turn is a step that was answered, with its reward."""
    known = {step.index: step for step in steps}
    for index, turn in enumerate(turns):
        step = known.get(index)
        if step is None:
            yield BrokenRule(RULE, f"{name}: nobody answered its step {index}")
        elif "reward" not in step.answer:
            yield BrokenRule(RULE, f"{name}: its step {index} failed", (step.call,))
        elif step.answer["reward"] != turn.reward or step.answer.get("action", "") != turn.action:
            yield BrokenRule(RULE, f"{name}: turn {index} is {turn.action!r}, {turn.reward}", (step.call,))
        elif step.action != (turn.text if turn.sent is None else turn.sent):
            yield BrokenRule(RULE, f"{name}: turn {index} is not what the environment was given", (step.call,))


def _check_reports(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    """The memory is told of no attempt that the infrastructure lost."""
    lost = {
        experience.memory_use_id
        for experience in final.experiences
        if experience.memory_use_id and all(s.reward is None for s in experience.samples if s.is_episode)
    }
    for call in named(calls, "ReportOutcome"):
        for one in call.request["outcomes"]:
            if one["use_id"] in lost:
                yield BrokenRule(RULE, f"a reward was reported for {one['use_id']}, whose attempts were lost", (call,))
