"""Commands that change an entry: `forget`, `erase`, `retire`, `release`."""

from __future__ import annotations

from typing import Annotated
from uuid import uuid4

import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, MemoryAddress
from mulligan.cli.memory.entries import ReflectionId, asked, entry_of
from mulligan.cli.out import fail, show
from mulligan.common.reflections import ReflectionStatus
from mulligan.memory.client import MemoryClient


def forget(reflection_id: ReflectionId, address: MemoryAddress = DEFAULT_ADDRESSES["memory"]) -> None:
    """Forget a reflection: from now on it is not retrieved.

    Example: `mulligan memory forget 8f14e45f`
    """

    async def delete(client: MemoryClient) -> int:
        entry = await entry_of(client, reflection_id)
        return await client.delete(entry.reflection_id, entry.revision)

    show(f"forgotten from version {asked(address, delete)} on")


def erase(
    reflection_id: ReflectionId,
    yes: Annotated[bool, typer.Option("--yes", help="Without this, it is only said what would be erased.")] = False,
    address: MemoryAddress = DEFAULT_ADDRESSES["memory"],
) -> None:
    """Erase a reflection's text, key, tags and embedding for good. Its id, its origin and its evidence stay.

    The journals of runs keep what they read and wrote: erase there, too, if that is the aim.

    Example: `mulligan memory erase 8f14e45f --yes`
    """

    async def call(client: MemoryClient) -> int:
        entry = await entry_of(client, reflection_id)
        if not yes:
            fail(
                f"this erases the text of {entry.reflection_id} ({entry.text[:60]!r}), for good, and older versions of "
                f"scope {entry.scope!r} cannot be read any more. --yes does it",
                2,
            )
        return await client.erase(entry.reflection_id, entry.revision)

    show(f"erased in version {asked(address, call)}")


def retire(reflection_id: ReflectionId, address: MemoryAddress = DEFAULT_ADDRESSES["memory"]) -> None:
    """Retire a reflection: it is not retrieved until it is released. Its evidence stays.

    Example: `mulligan memory retire 8f14e45f`
    """
    show(f"retired in revision {_revised(reflection_id, ReflectionStatus.RETIRED, address)}")


def release(reflection_id: ReflectionId, address: MemoryAddress = DEFAULT_ADDRESSES["memory"]) -> None:
    """Make a retired or quarantined reflection a candidate again. Its evidence starts anew.

    Example: `mulligan memory release 8f14e45f`
    """
    revision = _revised(reflection_id, ReflectionStatus.CANDIDATE, address)
    show(f"a candidate again, in revision {revision}, without evidence")


def _revised(reflection_id: str, status: ReflectionStatus, address: str) -> int:
    async def revise(client: MemoryClient) -> int:
        entry = await entry_of(client, reflection_id)
        return await client.revise(entry.reflection_id, f"{uuid4()}", entry.revision, status=status)

    return asked(address, revise)
