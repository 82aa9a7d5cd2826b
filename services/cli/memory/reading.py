"""Commands that read: `list`, `show`, `why`, `log`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, MemoryAddress
from mulligan.cli.memory.entries import ReflectionId, Scope, asked, entry_of, gone, measured
from mulligan.cli.out import note, table
from mulligan.cli.out import show as show_line
from mulligan.common.reflections import Explained, ReflectionKind, ReflectionStatus, StoredReflection
from mulligan.common.text import one_line
from mulligan.memory.client import MemoryClient

_LIMIT = 50
_TEXT = 80  # characters of a text in a table
_TIME = "%Y-%m-%d %H:%M:%S"
_WHY = {
    ReflectionStatus.CANDIDATE: "nothing is proved yet",
    ReflectionStatus.ACTIVE: "proved to help: the interval of its uplift was above zero",
    ReflectionStatus.QUARANTINED: "proved to harm: the interval of its uplift lies below zero",
    ReflectionStatus.RETIRED: "not retrieved, by somebody's choice",
    ReflectionStatus.PROBATION: "nothing is proved yet; made from other entries, or quarantined before",
}


def list_reflections(
    scope: Scope = "",
    kind: Annotated[ReflectionKind | None, typer.Option(help="Only this kind.")] = None,
    status: Annotated[ReflectionStatus | None, typer.Option(help="Only with this status.")] = None,
    key: Annotated[str, typer.Option(help="Only with this key.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="Only with this tag; of several, with all.")] = None,
    deleted: Annotated[bool, typer.Option("--deleted", help="Show forgotten and erased ones, too.")] = False,
    limit: Annotated[int, typer.Option(help="How many.", min=1)] = _LIMIT,
    everything: Annotated[bool, typer.Option("--all", help="List all, whatever the limit.")] = False,
    address: MemoryAddress = DEFAULT_ADDRESSES["memory"],
) -> None:
    """List reflections, oldest first.

    Example: `mulligan memory list --scope demo-1 --status quarantined`
    """

    def wanted(entry: StoredReflection) -> bool:
        return (
            kind in (None, entry.kind)
            and status in (None, entry.status)
            and key in ("", entry.key)
            and set(tag or ()) <= set(entry.tags)
        )

    listed = asked(address, lambda client: client.list(scope, include_deleted=deleted))
    entries = [entry for entry in listed if wanted(entry)]
    shown = entries if everything else entries[:limit]
    rows = []
    for entry in shown:
        gain = f"{entry.provenance.reward_before:g} → {entry.provenance.reward_after:g}"
        text = entry.text[:_TEXT] + (f" ({gone(entry)})" if gone(entry) else "")
        kept = (entry.reflection_id, entry.scope, entry.kind.value, entry.status.value, measured(entry.uplift))
        rows.append((*kept, str(entry.version), gain, text))
    columns = ("reflection", "scope", "kind", "status", "uplift", "version", "reward", "text")
    table(columns, rows, whole=("reflection", "scope"))
    if len(shown) < len(entries):
        note(f"{len(entries) - len(shown):,} more: --all lists them, --limit N the first N")


def show(reflection_id: ReflectionId, address: MemoryAddress = DEFAULT_ADDRESSES["memory"]) -> None:
    """Print one reflection with where it comes from.

    Example: `mulligan memory show 8f14e45f`
    """
    entry = asked(address, lambda client: entry_of(client, reflection_id))
    for line in _provenance(entry):
        show_line(one_line(line))
    show_line()
    show_line(entry.text)


def _provenance(entry: StoredReflection) -> Iterator[str]:
    origin = entry.provenance
    yield f"scope       {entry.scope}, version {entry.version}, {entry.created_at:{_TIME}}"
    yield f"kind        {entry.kind.value}, revision {entry.revision}"
    if entry.key or entry.tags:
        yield f"key, tags   {', '.join(filter(None, (entry.key, *entry.tags)))}"
    yield f"status      {entry.status.value}{f', {gone(entry)}' if gone(entry) else ''}"
    if entry.uplift is not None:
        uses = entry.uplift.uses_shown + entry.uplift.uses_left_out
        yield f"uplift      {measured(entry.uplift)} of {uses:,} uses"
    yield f"experience  {origin.experience_id} ({origin.environment} {origin.task_id})"
    yield f"written by  policy version {origin.policy_version}{origin.run_id and f' in run {origin.run_id}'}"
    yield f"reward      {origin.reward_before:g} → {origin.reward_after:g}"


def why(
    reflection_id: ReflectionId,
    uses: Annotated[int, typer.Option(help="How many of its latest uses to list.", min=1, max=1000)] = 10,
    address: MemoryAddress = DEFAULT_ADDRESSES["memory"],
) -> None:
    """Print why a reflection has its status: what came of uses with it and without it, and where it comes from.

    Example: `mulligan memory why 8f14e45f`
    """

    async def explain(client: MemoryClient) -> Explained:
        return await client.explain((await entry_of(client, reflection_id)).reflection_id, uses)

    explained = asked(address, explain)
    for line in _evidence(explained.reflection):
        show_line(one_line(line))
    if explained.uses:
        show_line(f"\nlatest {len(explained.uses)} uses")
        rows = []
        for use in explained.uses:
            reward = "" if use.reward is None else f"{use.reward:g}"
            rows.append((use.use_key, "shown" if use.shown else "left out", reward, f"{use.drawn_at:{_TIME}}"))
        table(("use", "it was", "reward", "drawn"), rows, whole=("use",))
    if explained.sources:
        show_line("\nmade from")
        made = [
            (one.reflection_id, one.status.value, measured(one.uplift), one.text[:_TEXT]) for one in explained.sources
        ]
        table(("reflection", "status", "uplift", "text"), made, whole=("reflection",))
    if explained.derived_ids:
        show_line(f"\nmade of it  {one_line(', '.join(explained.derived_ids))}")


def _evidence(entry: StoredReflection) -> Iterator[str]:
    yield f"reflection  {entry.reflection_id} ({entry.kind.value}, revision {entry.revision})"
    if gone(entry):
        yield f"            {gone(entry)}"
    yield f"status      {entry.status.value}: {_WHY[entry.status]}"
    uplift = entry.uplift
    if uplift is None:
        yield "uplift      unknown: no use of this text was reported"
        return
    yield f"with it     {_mean(uplift.mean_shown, uplift.uses_shown)}"
    yield f"without it  {_mean(uplift.mean_left_out, uplift.uses_left_out)}"
    estimate = "unknown" if uplift.uplift is None else f"{uplift.uplift:+.2f}"
    yield f"uplift      {estimate}, between {uplift.lower:+.2f} and {uplift.upper:+.2f} with probability 0.98 or more"


def _mean(reward: float, uses: int) -> str:
    return f"mean reward {reward:.2f} of {uses:,} uses" if uses else "no uses"


def log(
    scope: Scope = "",
    limit: Annotated[int, typer.Option(help="How many of the latest.", min=1)] = _LIMIT,
    everything: Annotated[bool, typer.Option("--all", help="Print all, whatever the limit.")] = False,
    address: MemoryAddress = DEFAULT_ADDRESSES["memory"],
) -> None:
    """Print who changed what, oldest first.

    Example: `mulligan memory log --scope demo-1`
    """
    changes = asked(address, lambda client: client.changes(scope))
    shown = changes if everything else changes[-limit:]
    columns = ("when", "scope", "version", "action", "reflection", "by", "detail")
    rows = [
        (f"{one.changed_at:{_TIME}}", one.scope, str(one.version), one.action, one.reflection_id, one.actor, one.detail)
        for one in shown
    ]
    table(columns, rows, whole=("scope", "reflection"))
    if len(shown) < len(changes):
        note(f"{len(changes) - len(shown):,} earlier ones: --all prints them, --limit N the latest N")
