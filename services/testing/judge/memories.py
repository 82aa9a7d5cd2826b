"""The memory: what was acknowledged is there once, versions are in the order of time, a use counts once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mulligan.common.reflections import StoredReflection
from mulligan.testing.judge.entries import EntryContent, differences, is_as_written
from mulligan.testing.judge.history import BrokenRule, RecordedCall, named
from mulligan.testing.judge.state import Final

RULE = "memory"
_FOLLOWING = ("quarantine", "activate", "recover")  # in the log: what a report changed, in its version


@dataclass(frozen=True, slots=True)
class _Write:
    """An addition that was acknowledged. It took effect at some moment between `start`, of its first call, and `end`,
    of its first answer."""

    version: int
    start: float
    end: float
    call: RecordedCall


def check(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    entries = {one.reflection_id: one for one in final.entries}
    yield from _check_additions(calls, final, entries)
    yield from _check_order(calls, final)
    yield from _check_reports(calls, final)
    yield from _check_evidence(calls, final)
    yield from _check_log(calls, final)


def _additions(calls: Sequence[RecordedCall]) -> dict[tuple[str, str], list[RecordedCall]]:
    """By scope and request."""
    found: dict[tuple[str, str], list[RecordedCall]] = defaultdict(list)
    for call in named(calls, "AddReflection"):
        found[call.request["scope"], call.request["request_id"]].append(call)
    return found


def _check_additions(
    calls: Sequence[RecordedCall], final: Final, entries: Mapping[str, StoredReflection]
) -> Iterator[BrokenRule]:
    asked = _additions(calls)
    acknowledged: dict[str, RecordedCall] = {}
    for (scope, request_id), of in asked.items():
        done = [call for call in of if call.ok and call.answer]
        answers = {(call.answer["reflection_id"], call.answer.get("version", 0)) for call in done if call.answer}
        if len(answers) > 1:
            yield BrokenRule(RULE, f"request {request_id} of {scope} has the answers {sorted(answers)}", tuple(done))
        for call in done:
            assert call.answer is not None
            stored = entries.get(call.answer["reflection_id"])
            if stored is None:
                yield BrokenRule(RULE, f"the acknowledged {call.answer['reflection_id']} is lost", (call,))
                break
            if call.request.get("unless_known"):
                if not _is_known(stored, call):
                    yield BrokenRule(RULE, f"{stored.reflection_id} is known, and has another text", (call,))
                continue
            other = acknowledged.setdefault(stored.reflection_id, call)
            if other.request["request_id"] != request_id:
                yield BrokenRule(RULE, f"two requests made the one entry {stored.reflection_id}", (other, call))
            if call.answer.get("version", 0) != stored.version:
                yield BrokenRule(RULE, f"{stored.reflection_id} was written in another version: {stored}", (call,))
            if told := differences(stored, EntryContent.recorded(call.request)):
                yield BrokenRule(RULE, f"{stored.reflection_id} is not what was written: it has {told}", (call,))
    yield from _check_known(asked, final)


def _is_known(stored: StoredReflection, call: RecordedCall) -> bool:
    """Whether the entry is one that has the text already. Its origin and labels are those of an earlier request."""
    asked, has = EntryContent.recorded(call.request), EntryContent.stored(stored)
    same = (asked.scope, asked.kind, asked.provenance.environment) == (has.scope, has.kind, has.provenance.environment)
    return same and (asked.text == has.text or not is_as_written(stored))


def _check_known(asked: Mapping[tuple[str, str], Sequence[RecordedCall]], final: Final) -> Iterator[BrokenRule]:
    """There is no entry that nobody asked for as it is, and none twice."""
    sent = [
        dict.fromkeys(EntryContent.recorded(call.request) for call in of if not call.refused) for of in asked.values()
    ]
    wanted = Counter(content for contents in sent for content in contents)
    lasting = {content.lasting for content in wanted}
    for entry in final.entries:
        if not is_as_written(entry) and EntryContent.stored(entry).lasting not in lasting:
            yield BrokenRule(RULE, f"nobody asked for {entry.reflection_id}: {entry}")
    found = Counter(EntryContent.stored(one) for one in final.entries if is_as_written(one))
    for content, count in found.items():
        if count > wanted[content]:
            origin = f"experience {content.provenance.experience_id!r}"
            what = f"{count} entries of {origin}, for which {wanted[content]} were asked: {str(content)[:300]}"
            calls = [call for of in asked.values() for call in of if EntryContent.recorded(call.request) == content]
            yield BrokenRule(RULE, what, tuple(calls))


def _writes(calls: Sequence[RecordedCall]) -> dict[str, list[_Write]]:
    """By scope, in the order of their beginnings."""
    found: dict[str, list[_Write]] = defaultdict(list)
    for (scope, _), of in _additions(calls).items():
        done = [call for call in of if call.ok and call.answer]
        if done and not done[0].request.get("unless_known"):
            first = min(done, key=lambda call: call.end)
            assert first.answer is not None
            write = _Write(first.answer.get("version", 0), min(call.start for call in of), first.end, first)
            found[scope].append(write)
    return {scope: sorted(writes, key=lambda write: write.start) for scope, writes in found.items()}


def _check_order(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    """Versions can be put in one order with the times of the calls: a write that ended before another began, or before
    a read began, has the lesser version."""
    for scope, writes in _writes(calls).items():
        of_version: dict[int, _Write] = {}
        for write in writes:
            other = of_version.setdefault(write.version, write)
            if other is not write:
                yield BrokenRule(RULE, f"two writes made version {write.version} of {scope}", (other.call, write.call))
            before = [one for one in writes if one.end < write.start and one.version > write.version]
            if before:
                yield BrokenRule(
                    RULE, f"version {write.version} of {scope} was made late", (before[0].call, write.call)
                )
        seen: list[tuple[int, RecordedCall]] = []
        for read in named(calls, "GetSnapshot"):
            if not read.ok or read.answer is None or read.request["scope"] != scope:
                continue
            version = read.answer.get("version", 0)
            missed = [one for one in writes if one.end < read.start and one.version > version]
            early = [one for one in writes if one.start > read.end and one.version <= version]
            back = [call for earlier, call in seen if call.end < read.start and earlier > version]
            wrong = [one.call for one in (*missed, *early)] + back
            if wrong:
                yield BrokenRule(RULE, f"a read of {scope} saw version {version}", (wrong[0], read))
            seen.append((version, read))


def _check_reports(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    """A use counts once, with the reward that was reported first."""
    recorded = {use.use_id: use.reward for uses in final.uses.values() for use in uses}
    reports = [call for call in named(calls, "ReportOutcome") if not call.refused]
    of_use: dict[str, list[RecordedCall]] = defaultdict(list)
    for call in reports:
        for one in call.request["outcomes"]:
            of_use[one["use_id"]].append(call)
    for use_id, reward in recorded.items():
        of = of_use.get(use_id, [])
        rewards = {_reward(call, use_id) for call in of}
        if reward is None and any(call.ok for call in of):
            yield BrokenRule(RULE, f"the acknowledged reward of use {use_id} is lost", tuple(of))
        elif reward is not None and reward not in rewards:
            yield BrokenRule(RULE, f"use {use_id} has the reward {reward}; reported were {sorted(rewards)}", tuple(of))
    for use_id in of_use.keys() - recorded.keys():
        if any(call.ok for call in of_use[use_id]):
            yield BrokenRule(RULE, f"use {use_id} was reported, and is lost", tuple(of_use[use_id]))
    answered = [call for call in reports if call.ok and call.answer is not None]
    counted = sum(call.answer.get("counted", 0) for call in answered if call.answer is not None)
    if counted > len(of_use):
        yield BrokenRule(RULE, f"{counted} uses were counted, and {len(of_use)} reported", tuple(answered))
    if len(answered) == len(reports) and counted < len(of_use):
        yield BrokenRule(RULE, f"{counted} uses were counted of {len(of_use)} that were reported", tuple(answered))


def _reward(call: RecordedCall, use_id: str) -> float:
    return next(float(one.get("reward", 0.0)) for one in call.request["outcomes"] if one["use_id"] == use_id)


def _check_evidence(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    """What an entry counts is what its uses say."""
    left_out = {
        use["use_id"]: use.get("left_out_id", "")
        for call in named(calls, "QueryReflections")
        if call.ok and call.answer
        for use in call.answer.get("uses", ())
    }
    for entry in final.entries:
        if entry.revision > 1:
            continue
        with_reward = [use for use in final.uses.get(entry.reflection_id, ()) if use.reward is not None]
        if any(use.use_id not in left_out for use in with_reward):
            continue  # its answer was lost, so what it left out is not known
        shown = sum(not left_out[use.use_id] for use in with_reward)
        without = sum(left_out[use.use_id] == entry.reflection_id for use in with_reward)
        uplift = entry.uplift
        found = (uplift.uses_shown, uplift.uses_left_out) if uplift is not None else (0, 0)
        if found != (shown, without):
            yield BrokenRule(RULE, f"{entry.reflection_id} counts {found} uses; there are {(shown, without)}")


def _check_log(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    """Each version was made by one write, and the log has each entry once."""
    made = [change.version for change in final.changes if change.action not in _FOLLOWING]
    if made != list(range(1, len(made) + 1)):
        yield BrokenRule(RULE, f"the log has the versions {made}")
    added = Counter(change.reflection_id for change in final.changes if change.action == "add")
    ids = {one.reflection_id for one in final.entries}
    if added.keys() != ids or any(count > 1 for count in added.values()):
        yield BrokenRule(RULE, f"the log has {sum(added.values())} additions of {len(ids)} entries")
    versions = {change.reflection_id: change.version for change in final.changes if change.action == "add"}
    for one in final.entries:
        if versions.get(one.reflection_id, one.version) != one.version:
            yield BrokenRule(RULE, f"{one.reflection_id} has version {one.version}, and another one in the log")
    reports = [call for call in named(calls, "ReportOutcome") if not call.refused]
    counted = {call.digest for call in reports if call.answer and call.answer.get("counted", 0)}
    logged = sum(change.action == "report" for change in final.changes)
    if not len(counted) <= logged <= len({call.digest for call in reports}):
        yield BrokenRule(RULE, f"{logged} reports in the log, of {len(counted)} that counted", tuple(reports))
