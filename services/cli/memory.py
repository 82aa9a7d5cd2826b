"""`mulligan memory`: what the reflection memory holds."""

from __future__ import annotations

from typing import Annotated

import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, MemoryAddress, endpoint, run
from mulligan.cli.ids import whole_id
from mulligan.cli.out import note, table
from mulligan.cli.out import show as show_line
from mulligan.common.reflections import StoredReflection
from mulligan.memory.client import MemoryClient

memory = typer.Typer(help="Look into the reflection memory: `list`, `show`, `forget`.", no_args_is_help=True)
_LIMIT = 50
ReflectionId = Annotated[str, typer.Argument(help="As `mulligan memory list` shows it; a unique beginning is enough.")]


@memory.command("list")
def list_reflections(
    scope: Annotated[str, typer.Option(help="A run's id, by default; all scopes when left out.")] = "",
    deleted: Annotated[bool, typer.Option("--deleted", help="Show forgotten ones, too.")] = False,
    limit: Annotated[int, typer.Option(help="How many.", min=1)] = _LIMIT,
    everything: Annotated[bool, typer.Option("--all", help="List all, whatever the limit.")] = False,
    address: MemoryAddress = DEFAULT_ADDRESSES["memory"],
) -> None:
    """List reflections, oldest first.

    Example: `mulligan memory list --scope demo-1 --limit 10`
    """
    entries = run(_list(scope, deleted, address))
    shown = entries if everything else entries[:limit]
    rows = []
    for entry in shown:
        gain = f"{entry.provenance.reward_before:g} → {entry.provenance.reward_after:g}"
        text = entry.text[:80]
        forgotten = f" (forgotten in {entry.deleted_version})" if entry.deleted_version is not None else ""
        rows.append((entry.reflection_id, entry.scope, str(entry.version), gain, text + forgotten))
    table(("reflection", "scope", "version", "reward", "text"), rows, whole=("reflection", "scope"))
    if len(shown) < len(entries):
        note(f"{len(entries) - len(shown):,} more: --all lists them, --limit N the first N")


@memory.command()
def show(reflection_id: ReflectionId, address: MemoryAddress = DEFAULT_ADDRESSES["memory"]) -> None:
    """Print one reflection with where it comes from.

    Example: `mulligan memory show 8f14e45f`
    """
    entry = run(_show(reflection_id, address))
    origin = entry.provenance
    show_line(f"scope       {entry.scope}, version {entry.version}, {entry.created_at:%Y-%m-%d %H:%M:%S}")
    show_line(f"experience  {origin.experience_id} ({origin.environment} {origin.task_id})")
    show_line(f"written by  policy version {origin.policy_version} in run {origin.run_id}")
    show_line(f"reward      {origin.reward_before:g} → {origin.reward_after:g}\n")
    show_line(entry.text)


@memory.command()
def forget(reflection_id: ReflectionId, address: MemoryAddress = DEFAULT_ADDRESSES["memory"]) -> None:
    """Forget a reflection: from now on it is not retrieved.

    Example: `mulligan memory forget 8f14e45f`
    """
    show_line(f"forgotten from version {run(_forget(reflection_id, address))} on")


async def _list(scope: str, deleted: bool, address: str) -> list[StoredReflection]:
    client = MemoryClient(endpoint(address))
    try:
        return await client.list(scope, include_deleted=deleted)
    finally:
        await client.close()


async def _show(reflection_id: str, address: str) -> StoredReflection:
    client = MemoryClient(endpoint(address))
    try:
        return await client.get(await _whole(client, reflection_id))
    finally:
        await client.close()


async def _forget(reflection_id: str, address: str) -> int:
    client = MemoryClient(endpoint(address))
    try:
        return await client.delete(await _whole(client, reflection_id))
    finally:
        await client.close()


async def _whole(client: MemoryClient, reflection_id: str) -> str:
    entries = await client.list("", include_deleted=True)
    return whole_id(reflection_id, (entry.reflection_id for entry in entries), "reflection")
