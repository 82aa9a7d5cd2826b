"""The judge: histories that keep every promise pass, and each change that breaks one is noticed, with its calls."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.common.reflections import MemoryChange, ReflectionKind
from mulligan.common.types import Outcome
from mulligan.testing.judge.access import NO_RUN, OTHER_RUN
from mulligan.testing.judge.history import BrokenRule, RecordedCall
from mulligan.testing.judge.verdict import judge
from tests.support.effort import examples
from tests.support.made_history import NOW, RUN, STEPS, Made, made_history

Change = Callable[[Made, random.Random], Made]


def verdict(made: Made) -> list[BrokenRule]:
    return judge(made.calls, made.final, made.environments, made.learner)


@settings(max_examples=examples(60))
@given(seed=st.integers(0, 2**32))
def test_a_history_that_keeps_every_promise_passes(seed: int) -> None:
    assert verdict(made_history(seed)) == []


def changed(made: Made, call: RecordedCall, **changes: Any) -> Made:
    return replace(made, calls=[replace(one, **changes) if one is call else one for one in made.calls])


def with_final(made: Made, **changes: Any) -> Made:
    return replace(made, final=replace(made.final, **changes))


def one_of(made: Made, chance: random.Random, *names: str) -> RecordedCall:
    """With an answer."""
    return chance.choice([call for call in made.calls if call.name in names and call.ok])


def another_observation(made: Made, chance: random.Random) -> Made:
    call = one_of(made, chance, "StepEpisode")
    return changed(made, call, answer=call.answer | {"observation": "another"})  # type: ignore[operator]


def a_step_that_is_skipped(made: Made, chance: random.Random) -> Made:
    """All answers of a step are those of the one after it: it was played twice."""
    call = one_of(made, chance, "StepEpisode")
    other = (call.answer or {}) | {"observation": "2 twice"}
    calls = [replace(one, answer=other) if one.request == call.request and one.ok else one for one in made.calls]
    return replace(made, calls=calls)


def a_step_after_the_end(made: Made, chance: random.Random) -> Made:
    ends = [call for call in made.calls if call.name == "StepEpisode" and call.ok and call.answer.get("done")]  # type: ignore[union-attr]
    if not ends:
        return another_observation(made, chance)
    call = chance.choice(ends)
    return replace(
        made, calls=[*made.calls, replace(call, request=call.request | {"step_index": call.request["step_index"] + 1})]
    )


def _sampled(made: Made, chance: random.Random, version: Callable[[int], int]) -> Made:
    call = one_of(made, chance, "Generate")
    (completion,) = (call.answer or {})["completions"]
    (span,) = completion["policy_versions"]
    wrong = completion | {"policy_versions": [span | {"policy_version": version(span["policy_version"])}]}
    return changed(made, call, answer={"completions": [wrong]})


def a_version_before(made: Made, chance: random.Random) -> Made:
    return _sampled(made, chance, lambda version: version - 1)


def a_version_of_later(made: Made, chance: random.Random) -> Made:
    return _sampled(made, chance, lambda version: version + 2)


def a_version_of_nobody(made: Made, chance: random.Random) -> Made:
    return _sampled(made, chance, lambda version: version + 1000)


def weights_of_nobody(made: Made, chance: random.Random) -> Made:
    call = one_of(made, chance, "UpdateWeights")
    return changed(made, call, request=call.request | {"sha256": "another"})


def a_version_that_is_lost(made: Made, chance: random.Random) -> Made:
    return with_final(made, versions=made.final.versions[:-1])


def an_update_that_goes_back(made: Made, chance: random.Random) -> Made:
    updates = [call for call in made.calls if call.name == "UpdateWeights" and call.ok]
    late = max(call.end for call in updates if call.end < float("inf"))
    first = min(updates, key=lambda call: call.start)
    return replace(made, calls=[*made.calls, replace(first, start=late + 1, end=late + 2)])


def a_write_that_is_lost(made: Made, chance: random.Random) -> Made:
    lost = chance.choice(made.final.entries)
    return with_final(
        made,
        entries=[one for one in made.final.entries if one is not lost],
        uses={name: of for name, of in made.final.uses.items() if name != lost.reflection_id},
    )


def a_write_that_is_there_twice(made: Made, chance: random.Random) -> Made:
    entry = chance.choice(made.final.entries)
    return with_final(made, entries=[*made.final.entries, replace(entry, reflection_id="again")])


def a_write_with_another_text(made: Made, chance: random.Random) -> Made:
    entry = chance.choice(made.final.entries)
    entries = [replace(one, text="another") if one is entry else one for one in made.final.entries]
    return with_final(made, entries=entries)


def _entry(made: Made, chance: random.Random, **changes: Any) -> Made:
    """One entry is stored in another way."""
    entry = chance.choice(made.final.entries)
    return with_final(made, entries=[replace(one, **changes) if one is entry else one for one in made.final.entries])


def _origin(made: Made, chance: random.Random, **changes: Any) -> Made:
    entry = chance.choice(made.final.entries)
    other = replace(entry, provenance=replace(entry.provenance, **changes))
    return with_final(made, entries=[other if one is entry else one for one in made.final.entries])


def a_write_with_another_reward(made: Made, chance: random.Random) -> Made:
    return _origin(made, chance, **{chance.choice(("reward_before", "reward_after")): 0.5})


def a_write_that_claims_no_success(made: Made, chance: random.Random) -> Made:
    return _origin(made, chance, success=False)


def a_write_of_another_task(made: Made, chance: random.Random) -> Made:
    return _origin(made, chance, **{chance.choice(("task_id", "environment", "run_id", "experience_id")): "another"})


def a_write_without_its_labels(made: Made, chance: random.Random) -> Made:
    return _entry(made, chance, **chance.choice(({"key": ""}, {"tags": ()}, {"kind": ReflectionKind.EPISODE})))


def a_write_with_a_source(made: Made, chance: random.Random) -> Made:
    return _entry(made, chance, source_ids=("another",))


def a_rewritten_entry_with_another_reward(made: Made, chance: random.Random) -> Made:
    """What cannot be rewritten is as it was written, also where the text is another one."""
    entry = chance.choice(made.final.entries)
    revised = replace(entry, text="another", revision=2)
    entries = [revised if one is entry else one for one in made.final.entries]
    assert verdict(with_final(made, entries=entries)) == []
    other = replace(revised, provenance=replace(entry.provenance, reward_after=0.5))
    found = verdict(with_final(made, entries=[other if one is revised else one for one in entries]))
    assert any("reward_after=0.5" in one.text for one in found)
    return with_final(made, entries=[other if one is revised else one for one in entries])


def _read(made: Made, chance: random.Random, change: Callable[[list[Any]], list[Any]]) -> Made:
    """A query found others."""
    queries = [call for call in made.calls if call.name == "QueryReflections" and call.ok]
    call = chance.choice([call for call in queries if len(call.answer["reflections"]) == 2])  # type: ignore[index]
    answer = call.answer or {}
    return changed(made, call, answer=answer | {"reflections": change(answer["reflections"])})


def a_read_that_has_each_entry_twice(made: Made, chance: random.Random) -> Made:
    return _read(made, chance, lambda found: [one for one in found for _ in range(2)])


def a_read_that_lacks_an_entry(made: Made, chance: random.Random) -> Made:
    left_out = chance.randrange(2)
    return _read(made, chance, lambda found: [one for place, one in enumerate(found) if place != left_out])


def a_read_in_another_order(made: Made, chance: random.Random) -> Made:
    return _read(made, chance, lambda found: found[::-1])


def a_read_with_other_rewards(made: Made, chance: random.Random) -> Made:
    return _read(
        made, chance, lambda found: [one | {"provenance": one["provenance"] | {"reward_after": 0.5}} for one in found]
    )


def a_read_of_what_is_quarantined(made: Made, chance: random.Random) -> Made:
    call = one_of(made, chance, "QueryReflections")
    identity = (call.answer or {})["reflections"][0]["reflection_id"]
    quarantined = MemoryChange(RUN, call.request["as_of_version"], "quarantine", identity, "trainer", NOW)
    return with_final(made, changes=[*made.final.changes, quarantined])


def uses_of_other_keys(made: Made, chance: random.Random) -> Made:
    call = one_of(made, chance, "QueryReflections")
    uses = [use | {"use_key": "another"} for use in (call.answer or {})["uses"]]
    return changed(made, call, answer=(call.answer or {}) | {"uses": uses})


def a_use_that_leaves_out_what_was_not_found(made: Made, chance: random.Random) -> Made:
    call = one_of(made, chance, "QueryReflections")
    uses = [use | {"left_out_id": "another"} for use in (call.answer or {})["uses"]]
    return changed(made, call, answer=(call.answer or {}) | {"uses": uses})


def a_snapshot_that_counts_wrongly(made: Made, chance: random.Random) -> Made:
    call = one_of(made, chance, "GetSnapshot")
    return changed(made, call, answer=(call.answer or {}) | {"reflection_count": 1000})


def a_write_with_another_version(made: Made, chance: random.Random) -> Made:
    call = one_of(made, chance, "AddReflection")
    return changed(made, call, answer=(call.answer or {}) | {"version": 1000})


def a_read_of_the_past(made: Made, chance: random.Random) -> Made:
    """Every read but the first sees nothing."""
    calls = [replace(call, answer={}) if call.name == "GetSnapshot" and call.ok else call for call in made.calls]
    return replace(made, calls=calls)


def a_reward_that_is_lost(made: Made, chance: random.Random) -> Made:
    uses = {name: [replace(use, reward=None) for use in of] for name, of in made.final.uses.items()}
    return with_final(made, uses=uses)


def a_reward_of_nobody(made: Made, chance: random.Random) -> Made:
    uses = {name: [replace(use, reward=0.123) for use in of] for name, of in made.final.uses.items()}
    return with_final(made, uses=uses)


def a_use_that_counts_twice(made: Made, chance: random.Random) -> Made:
    entry = chance.choice([one for one in made.final.entries if one.uplift is not None])
    assert entry.uplift is not None
    counted = replace(entry, uplift=replace(entry.uplift, uses_shown=entry.uplift.uses_shown + 1))
    return with_final(made, entries=[counted if one is entry else one for one in made.final.entries])


def a_report_that_counts_twice(made: Made, chance: random.Random) -> Made:
    calls = [
        replace(call, answer={"counted": 2 * (call.answer or {})["counted"]}) if call.name == "ReportOutcome" else call
        for call in made.calls
    ]
    return replace(made, calls=calls)


def an_optimizer_step_that_counts_twice(made: Made, chance: random.Random) -> Made:
    assert made.final.learner is not None
    steps = made.final.learner.optimizer_steps + 1
    return with_final(made, learner=replace(made.final.learner, optimizer_steps=steps))


def a_repeated_call_with_another_answer(made: Made, chance: random.Random) -> Made:
    call = one_of(made, chance, "OptimStep", "ForwardBackward")
    at = made.calls.index(call)
    return replace(made, calls=[*made.calls[: at + 1], replace(call, answer_digest="another"), *made.calls[at + 1 :]])


def a_gradient_that_was_added_twice(made: Made, chance: random.Random) -> Made:
    """All answers to an optimizer step say so."""
    call = one_of(made, chance, "OptimStep")
    metrics = (call.answer or {})["metrics"]
    twice = {"metrics": metrics | {"grad_norm": 2 * metrics["grad_norm"]}}
    calls = [replace(one, answer=twice) if one.request == call.request and one.ok else one for one in made.calls]
    return replace(made, calls=calls)


def a_step_that_ends_twice(made: Made, chance: random.Random) -> Made:
    step = chance.randrange(STEPS)
    return with_final(made, completions={**made.final.completions, step: 2})


def metrics_that_are_lost(made: Made, chance: random.Random) -> Made:
    return with_final(made, events=made.final.events[1:])


def an_experience_twice(made: Made, chance: random.Random) -> Made:
    return with_final(made, experiences=[*made.final.experiences, chance.choice(made.final.experiences)])


def _sample(made: Made, chance: random.Random, **changes: Any) -> Made:
    experience = chance.choice(made.final.experiences)
    other = replace(experience, samples=(replace(experience.samples[0], **changes),))
    return with_final(made, experiences=[other if one is experience else one for one in made.final.experiences])


def a_lost_episode_with_reward_zero(made: Made, chance: random.Random) -> Made:
    return _sample(made, chance, reward=0.0, turns=())


def a_lost_episode_that_is_cut_with_reward_zero(made: Made, chance: random.Random) -> Made:
    """The answer to its last step was never given."""
    experience = chance.choice(made.final.experiences)
    sample = experience.samples[0]
    last = len(sample.turns) - 1

    def asks(call: RecordedCall) -> bool:
        steps = call.request.get("steps", [call.request])
        return any(one.get("episode_id") == sample.episode_id and one.get("step_index") == last for one in steps)

    calls = [call for call in made.calls if not asks(call)]
    return _of(replace(made, calls=calls), experience, replace(sample, reward=0.0))


def a_failure_without_outcome(made: Made, chance: random.Random) -> Made:
    return _sample(made, chance, outcome=Outcome.ENV_ERROR)


def a_reward_that_is_another(made: Made, chance: random.Random) -> Made:
    return _sample(made, chance, reward=0.5)


def _reported(made: Made, change: Callable[[list[Any]], list[Any]]) -> Made:
    """All reports say something else, and the memory has it."""
    calls = [
        replace(call, request={"outcomes": change(call.request["outcomes"])}) if call.name == "ReportOutcome" else call
        for call in made.calls
    ]
    told = {one["use_id"]: one["reward"] for call in calls for one in call.request.get("outcomes", ())}
    uses = {
        name: [replace(use, reward=told.get(use.use_id, use.reward)) for use in of]
        for name, of in made.final.uses.items()
    }
    return with_final(replace(made, calls=calls), uses=uses)


def reports_that_are_all_the_same(made: Made, chance: random.Random) -> Made:
    return _reported(made, lambda outcomes: [one | {"reward": 0.25} for one in outcomes])


def a_use_that_is_never_reported(made: Made, chance: random.Random) -> Made:
    uses = sorted({one.memory_use_id for one in made.final.experiences} - {""})
    lost = chance.choice(uses)
    return _reported(made, lambda outcomes: [one for one in outcomes if one["use_id"] != lost])


def a_use_that_nobody_read(made: Made, chance: random.Random) -> Made:
    return _reported(made, lambda outcomes: [*outcomes, {"use_id": "another", "reward": 0.5}])


def _reader(made: Made, chance: random.Random, **changes: Any) -> Made:
    experience = chance.choice([one for one in made.final.experiences if one.memory_use_id])
    other = replace(experience, **changes)
    return with_final(made, experiences=[other if one is experience else one for one in made.final.experiences])


def an_experience_that_was_shown_what_its_use_leaves_out(made: Made, chance: random.Random) -> Made:
    return _reader(made, chance, memory_entry_ids=("another",))


def an_experience_with_another_left_out(made: Made, chance: random.Random) -> Made:
    return _reader(made, chance, memory_left_out_id="another")


def _evaluated(made: Made, chance: random.Random, **changes: Any) -> Made:
    told = chance.choice(made.final.evaluations)
    evaluations = [replace(one, **changes) if one is told else one for one in made.final.evaluations]
    return with_final(made, evaluations=evaluations)


def an_evaluation_of_invented_numbers(made: Made, chance: random.Random) -> Made:
    return _evaluated(made, chance, success=0.0, mean_reward=-7.0, attempts=99)


def an_evaluation_with_another_mean(made: Made, chance: random.Random) -> Made:
    return _evaluated(made, chance, **chance.choice(({"mean_reward": 0.5}, {"success": 0.5})))


def an_evaluation_that_excludes_what_has_a_reward(made: Made, chance: random.Random) -> Made:
    return _evaluated(made, chance, attempts=1, excluded=1)


def an_evaluation_that_counts_a_lost_attempt_as_zero(made: Made, chance: random.Random) -> Made:
    """Nobody was given the last steps of the attempt; without it the other one's numbers are right."""
    told = chance.choice(made.final.evaluations)
    lost = f"{RUN}-evaluation-{told.step}-t0-r1-"

    def ends(call: RecordedCall) -> bool:
        steps = call.request.get("steps", [call.request])
        return any(str(one.get("episode_id")).startswith(lost) and one.get("step_index") == 2 for one in steps)

    calls = [replace(call, answer=None, code="UNAVAILABLE") if ends(call) else call for call in made.calls]
    without = replace(told, attempts=1, excluded=1)
    evaluations = [without if one is told else one for one in made.final.evaluations]
    made = with_final(replace(made, calls=calls), evaluations=evaluations)
    assert verdict(made) == []
    zero = replace(told, success=0.5, mean_reward=0.5)
    return with_final(made, evaluations=[zero if one is without else one for one in evaluations])


def an_evaluation_that_is_told_twice(made: Made, chance: random.Random) -> Made:
    return with_final(made, evaluations=[*made.final.evaluations, chance.choice(made.final.evaluations)])


def an_evaluation_that_is_lost(made: Made, chance: random.Random) -> Made:
    lost = chance.choice(made.final.evaluations)
    return with_final(made, evaluations=[one for one in made.final.evaluations if one is not lost])


def _of(made: Made, experience: Any, sample: Any) -> Made:
    other = replace(experience, samples=(sample,))
    return with_final(made, experiences=[other if one is experience else one for one in made.final.experiences])


def a_stranger_who_is_answered(made: Made, chance: random.Random) -> Made:
    call = chance.choice([call for call in made.calls if call.ok])
    return replace(made, calls=[*made.calls, replace(call, caller="stranger", credential="none")])


def a_reader_who_writes(made: Made, chance: random.Random) -> Made:
    call = one_of(made, chance, "AddReflection", "Generate", "GenerateMany", "UpdateWeights", "OptimStep")
    return replace(made, calls=[*made.calls, replace(call, caller="stranger", credential="reader")])


def a_trainer_of_another_run_who_writes(made: Made, chance: random.Random) -> Made:
    call = one_of(made, chance, "AddReflection")
    return replace(made, calls=[*made.calls, replace(call, caller="stranger", credential=OTHER_RUN)])


def a_trainer_without_a_run_whose_call_is_looked_at(made: Made, chance: random.Random) -> Made:
    call = one_of(made, chance, "OptimStep")
    refused = replace(call, caller="stranger", credential=NO_RUN, answer=None, code="ABORTED")
    kept_out = replace(refused, code="PERMISSION_DENIED", reason="RUN_CREDENTIAL")
    assert not judge([*made.calls, kept_out], made.final, made.environments)
    return replace(made, calls=[*made.calls, replace(refused, reason="SEQUENCE_MISMATCH")])


def an_owner_who_is_refused(made: Made, chance: random.Random) -> Made:
    call = chance.choice(made.calls)
    return changed(made, call, answer=None, code="UNAUTHENTICATED", reason="BAD_CREDENTIAL")


def a_run_that_fails(made: Made, chance: random.Random) -> Made:
    return with_final(made, state="failed")


CHANGES: dict[Change, str] = {
    another_observation: "episodes",
    a_step_that_is_skipped: "episodes",
    a_step_after_the_end: "episodes",
    a_version_before: "versions",
    a_version_of_later: "versions",
    a_version_of_nobody: "versions",
    weights_of_nobody: "versions",
    a_version_that_is_lost: "versions",
    an_update_that_goes_back: "versions",
    a_write_that_is_lost: "memory",
    a_write_that_is_there_twice: "memory",
    a_write_with_another_text: "memory",
    a_write_with_another_version: "memory",
    a_write_with_another_reward: "memory",
    a_write_that_claims_no_success: "memory",
    a_write_of_another_task: "memory",
    a_write_without_its_labels: "memory",
    a_write_with_a_source: "memory",
    a_rewritten_entry_with_another_reward: "memory",
    a_read_that_has_each_entry_twice: "memory",
    a_read_that_lacks_an_entry: "memory",
    a_read_in_another_order: "memory",
    a_read_with_other_rewards: "memory",
    a_read_of_what_is_quarantined: "memory",
    uses_of_other_keys: "memory",
    a_use_that_leaves_out_what_was_not_found: "memory",
    a_snapshot_that_counts_wrongly: "memory",
    a_read_of_the_past: "memory",
    a_reward_that_is_lost: "memory",
    a_reward_of_nobody: "memory",
    a_use_that_counts_twice: "memory",
    a_report_that_counts_twice: "memory",
    an_optimizer_step_that_counts_twice: "learner",
    a_repeated_call_with_another_answer: "learner",
    a_gradient_that_was_added_twice: "learner",
    a_step_that_ends_twice: "learner",
    metrics_that_are_lost: "learner",
    an_experience_twice: "learner",
    a_lost_episode_with_reward_zero: "rewards",
    a_lost_episode_that_is_cut_with_reward_zero: "rewards",
    a_failure_without_outcome: "rewards",
    a_reward_that_is_another: "rewards",
    reports_that_are_all_the_same: "rewards",
    a_use_that_is_never_reported: "rewards",
    a_use_that_nobody_read: "rewards",
    an_experience_that_was_shown_what_its_use_leaves_out: "rewards",
    an_experience_with_another_left_out: "rewards",
    an_evaluation_of_invented_numbers: "evaluations",
    an_evaluation_with_another_mean: "evaluations",
    an_evaluation_that_excludes_what_has_a_reward: "evaluations",
    an_evaluation_that_counts_a_lost_attempt_as_zero: "evaluations",
    an_evaluation_that_is_told_twice: "evaluations",
    an_evaluation_that_is_lost: "evaluations",
    a_stranger_who_is_answered: "access",
    a_reader_who_writes: "access",
    a_trainer_of_another_run_who_writes: "access",
    a_trainer_without_a_run_whose_call_is_looked_at: "access",
    an_owner_who_is_refused: "access",
    a_run_that_fails: "run",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@settings(max_examples=examples(10))
@given(seed=st.integers(0, 2**32))
def test_a_broken_promise_is_noticed(change: Change, seed: int) -> None:
    broken = change(made_history(seed), random.Random(seed))
    found = verdict(broken)
    assert CHANGES[change] in {violation.rule for violation in found}, found


def together(made: Made) -> Made:
    """The same, where each start and each addition comes in a call for several, beside one that is refused."""

    def of(call: RecordedCall) -> RecordedCall:
        name, requests, result = {
            "StartEpisode": ("StartEpisodes", "starts", "episode"),
            "AddReflection": ("AddReflections", "reflections", "added"),
        }.get(call.name, ("", "", ""))
        if not name:
            return call
        answer = call.answer
        if answer is not None:
            refused = {"error": {"code": 5, "reason": "UNKNOWN_TASK", "message": "no"}}
            answer = {"items": [refused, {result: answer}]}
        method = f"{call.method.rpartition('/')[0]}/{name}"
        other = call.request | {"request_id": "other", "episode_id": "other", "text": "other"}
        return replace(call, method=method, request={requests: [other, call.request]}, answer=answer)

    return replace(made, calls=[of(call) for call in made.calls])


@settings(max_examples=examples(20))
@given(seed=st.integers(0, 2**32))
def test_calls_for_several_are_judged_as_those_that_they_are(seed: int) -> None:
    made = made_history(seed)
    assert verdict(together(made)) == []
    for change in (a_write_that_is_lost, a_write_with_another_text, a_write_with_another_version):
        found = verdict(together(change(made, random.Random(seed))))
        assert "memory" in {violation.rule for violation in found}, found
    begun = one_of(made, random.Random(seed), "StartEpisode")
    another = changed(made, begun, answer=(begun.answer or {}) | {"observation": "another"})
    assert "episodes" in {violation.rule for violation in verdict(together(another))}


def test_a_violation_names_its_calls() -> None:
    broken = another_observation(made_history(1), random.Random(1))
    text = "\n".join(map(str, verdict(broken)))
    assert "episodes: step " in text and "trainer StepEpisode(" in text and "→ OK" in text
