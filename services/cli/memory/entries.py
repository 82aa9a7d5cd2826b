"""What the commands share: a client for one command, whole ids, and how an entry's evidence is written."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from mulligan.cli.connection import endpoint, run
from mulligan.cli.ids import whole_id
from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import StoredReflection, Uplift
from mulligan.memory.client import MemoryClient

T = TypeVar("T")
ReflectionId = Annotated[str, typer.Argument(help="As `mulligan memory list` shows it; a unique beginning is enough.")]
Scope = Annotated[str, typer.Option(help="A run's id, by default; all scopes when left out.")]


def asked(address: str, what: Callable[[MemoryClient], Awaitable[T]]) -> T:
    """What the calls of a command return."""

    async def main() -> T:
        client = MemoryClient(endpoint(address))
        try:
            return await what(client)
        finally:
            await client.close()

    return run(main())


async def entry_of(client: MemoryClient, given: str) -> StoredReflection:
    """The entry whose id begins so. Ends the program if there is none, or more than one."""
    try:
        return await client.get(given)
    except DomainError as error:
        if error.reason not in (Reason.UNKNOWN_REFLECTION, Reason.INVALID_FIELD):
            raise
    entries = {entry.reflection_id: entry for entry in await client.list("", include_deleted=True)}
    return entries[whole_id(given, entries, "reflection")]


def measured(uplift: Uplift | None) -> str:
    """`+0.12 (-0.03 … +0.27)`: the estimate, and the interval. Empty without uses of both sorts."""
    if uplift is None or uplift.uplift is None:
        return ""
    return f"{uplift.uplift:+.2f} ({uplift.lower:+.2f} … {uplift.upper:+.2f})"


def gone(entry: StoredReflection) -> str:
    """Since when it is not retrieved any more; empty while it is."""
    if entry.erased_version is not None:
        return f"erased in {entry.erased_version}"
    return "" if entry.deleted_version is None else f"forgotten in {entry.deleted_version}"
