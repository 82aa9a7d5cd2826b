"""Answers to queries: each entry once, as it was written, and none hidden.

The model of a query knows one strategy, LATEST_SUCCESS: what the memory held at a version follows from its entries and
its log at the end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mulligan.common.reflections import MemoryChange, ReflectionStatus, StoredReflection
from mulligan.testing.judge.entries import EntryContent, differences, is_as_written
from mulligan.testing.judge.history import BrokenRule, RecordedCall, named
from mulligan.testing.judge.state import Final

RULE = "memory"
_LATEST_SUCCESS = 1  # as the contract numbers the strategies
_STATUS_AFTER = {
    "quarantine": ReflectionStatus.QUARANTINED,
    "activate": ReflectionStatus.ACTIVE,
    "recover": ReflectionStatus.PROBATION,
}
_FOUND = (ReflectionStatus.CANDIDATE, ReflectionStatus.ACTIVE)


def check(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    entries = {one.reflection_id: one for one in final.entries}
    changes: dict[str, list[MemoryChange]] = defaultdict(list)
    for change in final.changes:
        changes[change.reflection_id].append(change)
    uses: dict[str, tuple[tuple[str, str], RecordedCall]] = {}
    for call in named(calls, "QueryReflections"):
        if call.ok and call.answer is not None:
            yield from _check_entries(call, entries)
            yield from _check_uses(call, uses)
            yield from _check_found(call, final, changes)
    yield from _check_counts(calls, final)


def _check_entries(call: RecordedCall, entries: Mapping[str, StoredReflection]) -> Iterator[BrokenRule]:
    """What is read was written, and belongs to the version that was asked for."""
    assert call.answer is not None
    version = call.request.get("as_of_version")
    if version is not None and call.answer.get("version", 0) != version:
        yield BrokenRule(RULE, f"version {version} was asked for, and another answered", (call,))
    read = call.answer.get("reflections", ())
    twice = [identity for identity, count in Counter(one["reflection_id"] for one in read).items() if count > 1]
    if twice:
        yield BrokenRule(RULE, f"read twice in one answer: {twice}", (call,))
    for one in read:
        identity = one["reflection_id"]
        stored = entries.get(identity)
        if stored is None:
            yield BrokenRule(RULE, f"{identity} was read, and is lost", (call,))
            continue
        if one.get("version", 0) > call.answer.get("version", 0):
            yield BrokenRule(RULE, f"{identity} was read as of a version before it", (call,))
        if one.get("version", 0) != stored.version:
            yield BrokenRule(RULE, f"{identity} was read with version {one.get('version', 0)}", (call,))
        if told := differences(stored, EntryContent.recorded(one)):
            yield BrokenRule(RULE, f"{identity} was read as another: it is stored with {told}", (call,))


def _check_uses(call: RecordedCall, known: dict[str, tuple[tuple[str, str], RecordedCall]]) -> Iterator[BrokenRule]:
    """A use for each key, in their order, which leaves out an entry of the answer or none, and the same whenever it is
    asked for again."""
    assert call.answer is not None
    uses = call.answer.get("uses", ())
    read = {one["reflection_id"] for one in call.answer.get("reflections", ())}
    keys = call.request.get("trial", {}).get("use_keys", []) if read else []
    if [use.get("use_key", "") for use in uses] != keys:
        yield BrokenRule(RULE, f"the uses of an answer are not those of the keys {keys}", (call,))
    for use in uses:
        left_out = use.get("left_out_id", "")
        if left_out and left_out not in read:
            yield BrokenRule(RULE, f"use {use['use_id']} leaves out {left_out}, which was not found", (call,))
        drawn = (use.get("use_key", ""), left_out)
        before, earlier = known.setdefault(use["use_id"], (drawn, call))
        if before != drawn:
            yield BrokenRule(RULE, f"use {use['use_id']} is {drawn}, and was {before}", (earlier, call))


@dataclass
class _Held:
    """What a query has to find: `sure` the latest first, and `unsure` what was rewritten since."""

    sure: list[str] = field(default_factory=list)
    unsure: set[str] = field(default_factory=set)


def _check_found(
    call: RecordedCall, final: Final, changes: Mapping[str, Sequence[MemoryChange]]
) -> Iterator[BrokenRule]:
    """LATEST_SUCCESS finds the latest entries that report a success, and leaves none out."""
    assert call.answer is not None
    if call.request.get("strategy") != _LATEST_SUCCESS or call.request.get("max_tokens"):
        return  # which texts fit is not modelled
    held = _held(call, final, changes)
    found = [one["reflection_id"] for one in call.answer.get("reflections", ())]
    known = [identity for identity in found if identity not in held.unsure]
    limit = call.request.get("limit", 0) or 1
    wanted = held.sure[: limit if len(found) >= limit else None]
    if len(found) > limit or known != wanted[: len(known)] or (len(found) < limit and known != wanted):
        version = call.answer.get("version", 0)
        what = f"a query at version {version} found {found}, and had to find the first {limit} of {held.sure}"
        yield BrokenRule(RULE, what, (call,))


def _held(call: RecordedCall, final: Final, changes: Mapping[str, Sequence[MemoryChange]]) -> _Held:
    assert call.answer is not None
    asked, version = call.request, call.answer.get("version", 0)
    held = _Held()
    for entry in sorted(final.entries, key=lambda one: -one.version):
        origin = entry.provenance
        if (entry.scope, origin.environment) != (asked["scope"], asked["environment"]) or not origin.success:
            continue
        if not origin.task_id.startswith(asked.get("task_prefix", "")) or not _exists(entry, version):
            continue
        content = EntryContent.stored(entry)
        kinds = [EntryContent.recorded({"kind": kind}).kind for kind in asked.get("kinds", ())]
        if kinds and content.kind not in kinds:
            continue
        if not is_as_written(entry):
            held.unsure.add(entry.reflection_id)
            continue
        labelled = asked.get("key", "") in ("", content.key) and set(asked.get("tags", ())) <= set(content.tags)
        if labelled and _status(entry, version, changes.get(entry.reflection_id, ())) in _FOUND:
            held.sure.append(entry.reflection_id)
    return held


def _exists(entry: StoredReflection, version: int) -> bool:
    ends = [one for one in (entry.deleted_version, entry.erased_version) if one is not None]
    return entry.version <= version and all(end > version for end in ends)


def _status(entry: StoredReflection, version: int, changes: Sequence[MemoryChange]) -> ReflectionStatus:
    """At a version, of an entry that nobody has revised."""
    status = ReflectionStatus.PROBATION if entry.source_ids else ReflectionStatus.CANDIDATE
    for change in changes:
        if change.version <= version:
            status = _STATUS_AFTER.get(change.action, status)
    return status


def _check_counts(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    """A snapshot counts the entries that there were at its version."""
    for call in named(calls, "GetSnapshot"):
        if not call.ok or call.answer is None or call.request["scope"] != final.run_id:
            continue
        version, told = call.answer.get("version", 0), call.answer.get("reflection_count", 0)
        count = sum(_exists(entry, version) for entry in final.entries)
        if told != count:
            yield BrokenRule(RULE, f"version {version} has {count} entries, and {told} were told", (call,))
