"""Policy versions: each token bears a version that served between the begin and the end of its call.

A version serves from some moment of its update on, until some moment of the update to a greater one. The policy keeps
its versions over a restart (`state_folder`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mulligan.common.inference import VersionState
from mulligan.testing.judge.history import BrokenRule, RecordedCall, named
from mulligan.testing.judge.state import Final

RULE = "versions"


@dataclass(frozen=True, slots=True)
class ToldCompletion:
    """A completion: what was asked, and the versions of its tokens, with their counts."""

    request: Mapping[str, Any]
    spans: tuple[tuple[int, int], ...]
    tokens: int
    call: RecordedCall

    @property
    def versions(self) -> set[int]:
        return {version for version, _ in self.spans}


def told_completions(calls: Sequence[RecordedCall]) -> list[ToldCompletion]:
    return [
        ToldCompletion(request, _spans(completion), _count(completion.get("token_ids", ())), call)
        for call in named(calls, "Generate", "GenerateMany")
        for request, answer in _answers(call)
        for completion in answer.get("completions", ())
    ]


def _answers(call: RecordedCall) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    if call.answer is None:
        return
    if call.name == "Generate":
        yield call.request, call.answer
        return
    for item in call.answer.get("items", ()):
        if "response" in item:
            yield call.request["requests"][item.get("index", 0)], item["response"]


def _spans(completion: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    spans = completion.get("policy_versions", ())
    return tuple((span.get("policy_version", 0), span.get("token_count", 0)) for span in spans)


def _count(tokens: Any) -> int:
    """The recorder writes the length of a long list in its place."""
    return tokens if isinstance(tokens, int) else len(tokens)


def check(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    updates: dict[str, list[RecordedCall]] = defaultdict(list)
    for call in named(calls, "UpdateWeights"):
        if not call.refused:
            updates[call.request.get("policy", "")].append(call)
    for policy, of in updates.items():
        yield from _check_updates(calls, policy, of)
    for one in told_completions(calls):
        yield from _check_sample(one, updates.get(one.request.get("policy", ""), []))
    yield from _check_listed(updates.get("", []), final)
    yield from _check_journal(calls, final)


def _version(update: RecordedCall) -> int:
    return int(update.request["policy_version"])


def _check_updates(calls: Sequence[RecordedCall], policy: str, updates: Sequence[RecordedCall]) -> Iterator[BrokenRule]:
    """They are monotone, and what serves is what the learner published."""
    done = sorted((call for call in updates if call.ok), key=lambda call: call.end)
    for index, later in enumerate(done):
        for earlier in done[:index]:
            if earlier.end < later.start and _version(earlier) > _version(later):
                what = f"version {_version(later)} of policy {policy!r} was served after {_version(earlier)}"
                yield BrokenRule(RULE, what, (earlier, later))
            same = _version(earlier) == _version(later)
            if same and earlier.request["sha256"] != later.request["sha256"]:
                yield BrokenRule(RULE, f"version {_version(later)} has two contents", (earlier, later))
    published = {call.answer["sha256"] for call in named(calls, "PublishWeights") if call.ok and call.answer}
    for call in done if published else ():
        if call.request["sha256"] not in published:
            yield BrokenRule(RULE, f"version {_version(call)} was published by no learner", (call,))


def _check_sample(one: ToldCompletion, updates: Sequence[RecordedCall]) -> Iterator[BrokenRule]:
    if sum(count for _, count in one.spans) != one.tokens:
        yield BrokenRule(RULE, f"versions of {one.spans} tokens, of which there are {one.tokens}", (one.call,))
    for version in sorted(one.versions):
        asked = one.request.get("min_policy_version", 0)
        if version < asked:
            yield BrokenRule(RULE, f"version {version} answered where at least {asked} was asked for", (one.call,))
        begun = [call for call in updates if _version(call) == version]
        if begun and min(call.start for call in begun) > one.call.end:
            yield BrokenRule(RULE, f"version {version} answered before it was served", (one.call, begun[0]))
        if not begun and any(_version(call) < version for call in updates):
            yield BrokenRule(RULE, f"version {version} answered, and was never served", (one.call,))
        for call in updates:
            if call.ok and _version(call) > version and call.end < one.call.start:
                what = f"version {version} answered after {_version(call)} had taken its place"
                yield BrokenRule(RULE, what, (call, one.call))
                break


def _check_listed(updates: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    listed = {one.policy_version: one for one in final.versions}
    for call in updates:
        if not call.ok:
            continue
        one = listed.get(_version(call))
        if one is None or one.sha256 != call.request["sha256"]:
            yield BrokenRule(RULE, f"version {_version(call)} is not listed, or with another content", (call,))
    serving = [one.policy_version for one in final.versions if one.state is VersionState.SERVING]
    done = [call for call in updates if call.ok]
    if not done:
        return
    newest = max(done, key=_version)
    if len(serving) != 1 or serving[0] < _version(newest):
        yield BrokenRule(RULE, f"{serving} serve at the end", (newest,))


def _check_journal(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    """The journal has the versions that the policy told."""
    told: dict[str, set[int]] = defaultdict(set)
    for one in told_completions(calls):
        told[one.request.get("request_id", "").rpartition("-")[0]] |= one.versions
    for experience in final.experiences:
        for sample in experience.samples:
            segments = [segment for sequence in sample.sequences for segment in sequence.segments]
            found = {span.policy_version for segment in segments for span in segment.policy_versions}
            if not sample.policy and not found <= told[sample.sample_id]:
                what = f"{sample.sample_id} has versions {sorted(found)}; told were {sorted(told[sample.sample_id])}"
                yield BrokenRule(RULE, what)
