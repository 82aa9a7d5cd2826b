"""Rewards: each is what the environment answered, and what the infrastructure lost has none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from mulligan.common.experience import Experience, Sample, Turn
from mulligan.common.reflections import Provenance
from mulligan.common.rewards import reaches, total
from mulligan.common.types import Outcome
from mulligan.env.base import Environment
from mulligan.testing.judge.entries import EntryContent
from mulligan.testing.judge.episodes import AnsweredStep, answered_steps, asked_steps
from mulligan.testing.judge.history import BrokenRule, RecordedCall, named
from mulligan.testing.judge.state import Final

RULE = "rewards"
_ROUNDING = 1e-9
_ENDS = {
    Outcome.COMPLETED: (1,),
    Outcome.TRUNCATED: (0, 1, 2),
}  # outcomes of the last step, as the contract numbers them


def check(calls: Sequence[RecordedCall], final: Final, environments: Mapping[str, Environment]) -> Iterator[BrokenRule]:
    steps = answered_steps(calls)
    asked = asked_steps(calls)
    for experience in final.experiences:
        for sample in experience.samples:
            if sample.is_episode and sample.forked_from is None:
                yield from _check_sample(sample, steps, asked)
    yield from _check_reports(calls, final, environments)
    yield from _check_uses(calls, final)
    yield from _check_lessons(calls, final)


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
    if abs(total(turn.reward for turn in sample.tries[-1]) - sample.reward) > _ROUNDING:
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


def _check_reports(
    calls: Sequence[RecordedCall], final: Final, environments: Mapping[str, Environment]
) -> Iterator[BrokenRule]:
    """The memory is told of each use that was read once its step is trained, with what the attempts earned that it
    could change, and of nothing else: of no attempt that the infrastructure lost."""
    of_use = {one.memory_use_id: one for one in final.experiences if one.memory_use_id}
    expected = {use_id: _use_reward(one, final, environments) for use_id, one in of_use.items()}
    told: set[str] = set()
    for call in named(calls, "ReportOutcome"):
        for one in call.request["outcomes"]:
            use_id, reward = one["use_id"], one.get("reward", 0.0)
            told.add(use_id)
            wanted = expected.get(use_id)
            if use_id not in expected:
                yield BrokenRule(RULE, f"a reward was reported for use {use_id}, which nobody read", (call,))
            elif wanted is None:
                yield BrokenRule(RULE, f"a reward was reported for {use_id}, whose attempts were lost", (call,))
            elif abs(wanted - reward) > _ROUNDING:
                what = f"use {use_id} of {of_use[use_id].experience_id} was reported with {reward}, and earned {wanted}"
                yield BrokenRule(RULE, what, (call,))
    for use_id, experience in of_use.items():
        if experience.step < final.steps and expected[use_id] is not None and use_id not in told:
            yield BrokenRule(RULE, f"use {use_id} of {experience.experience_id} was never reported")


def _use_reward(experience: Experience, final: Final, environments: Mapping[str, Environment]) -> float | None:
    """From 0 to 1, where 1 is the environment's greatest reward. The first attempt, if that read the entries; else the
    attempts after a text, in the mean."""
    texts = {sample.sample_id for sample in experience.samples if not sample.is_episode}
    if final.readers_play:
        attempts = list(experience.samples[:1])
    else:
        attempts = [sample for sample in experience.samples if sample.is_episode and sample.parent_id in texts]
    most = environments[experience.environment].info.max_reward
    earned = [
        min(max(sample.reward / most, 0.0), 1.0) if most > 0 else float(reaches(sample.reward, final.threshold))
        for sample in attempts
        if sample.reward is not None
    ]
    return fmean(earned) if earned else None


def _check_uses(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    """Each experience has the use that was drawn for it, and was shown what was found but for what that leaves out."""
    drawn = {
        use["use_id"]: (call, use)
        for call in named(calls, "QueryReflections")
        if call.ok and call.answer
        for use in call.answer.get("uses", ())
    }
    for one in final.experiences:
        if one.memory_use_id not in drawn:
            continue  # it has none, or nobody got the answer
        call, use = drawn[one.memory_use_id]
        left_out = use.get("left_out_id", "")
        found = [entry["reflection_id"] for entry in (call.answer or {}).get("reflections", ())]
        shown = tuple(entry for entry in found if entry != left_out)
        wanted = (use.get("use_key", ""), left_out, shown)
        has = (one.experience_id, one.memory_left_out_id, one.memory_entry_ids)
        if has != wanted:
            what = f"use {one.memory_use_id} is recorded with (key, left out, shown) {has}, and was drawn with {wanted}"
            yield BrokenRule(RULE, what, (call,))


def _check_lessons(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    """The memory is told of a text, such as a reflection, with the rewards of the attempts before and after it."""
    texts = {
        sample.sample_id: (experience, sample)
        for experience in final.experiences
        for sample in experience.samples
        if not sample.is_episode
    }
    for call in named(calls, "AddReflection"):
        if call.request["request_id"] not in texts:
            continue
        experience, text = texts[call.request["request_id"]]
        told = EntryContent.recorded(call.request)
        before = [one.reward for one in experience.samples if one.sample_id == text.parent_id]
        after = [one.reward for one in experience.samples if one.is_episode and one.parent_id == text.sample_id]
        possible = [
            Provenance(
                final.run_id,
                experience.experience_id,
                experience.environment,
                experience.task_id,
                text.policy_version,
                earlier,
                later,
                reaches(later, final.threshold),
            )
            for earlier in before
            for later in after
            if earlier is not None and later is not None
        ]
        if told.text != text.text or told.provenance not in possible:
            what = f"{text.sample_id} was written as {told.text[:100]!r} of {told.provenance}, not of {possible}"
            yield BrokenRule(RULE, what, (call,))
