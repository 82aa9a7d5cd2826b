"""`mulligan memory consolidate`: a policy merges entries into one text, which is on probation."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from typing import Annotated

import typer

from mulligan.cli.connection import (
    DEFAULT_ADDRESSES,
    EnvAddress,
    MemoryAddress,
    PolicyAddress,
    endpoint,
    run,
)
from mulligan.cli.out import fail, note, show, working
from mulligan.common.inference import SamplingParams
from mulligan.common.reflections import ReflectionKind, RetrievalStrategy
from mulligan.env.client import EnvClient
from mulligan.memory.client import MemoryClient
from mulligan.policy.client import PolicyClient
from mulligan.trainer.consolidation import (
    FEWEST,
    INSTRUCTION,
    MOST,
    CannotMerge,
    MergeSettings,
    keep,
    merge,
    sources_of,
)
from mulligan.trainer.sampling import NamedPolicy


def consolidate(
    scope: Annotated[str, typer.Option(help="Whose entries; a run's id, by default of runs.")],
    environment: Annotated[str, typer.Option(help="Of the entries, as the environment service names it.")],
    key: Annotated[str, typer.Option(help="Only entries with this key; the new one gets it, too.")] = "",
    kind: Annotated[list[ReflectionKind] | None, typer.Option(help="Only of this kind; repeatable.")] = None,
    limit: Annotated[int, typer.Option(help="How many entries at most.", min=FEWEST, max=MOST)] = 8,
    strategy: Annotated[
        RetrievalStrategy, typer.Option(help="Which come first; one that needs no text.")
    ] = RetrievalStrategy.BEST_UPLIFT,
    policy: Annotated[str, typer.Option(help="Name of a policy of the policy service; its default one.")] = "",
    instruction: Annotated[
        str,
        typer.Option(
            help="What the policy is told; {entries} stands for the entries in blocks, {texts} for their bare texts.",
            show_default="merge them, add nothing",
        ),
    ] = INSTRUCTION,
    system: Annotated[str, typer.Option(help="System prompt of the policy; none when left out.")] = "",
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Of the answer.", min=1)] = 1024,
    seed: Annotated[int, typer.Option(help="Of all random choices.", min=0)] = 0,
    repeat: Annotated[int, typer.Option(help="How many texts to have written.", min=1)] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the text; store nothing.")] = False,
    memory: MemoryAddress = DEFAULT_ADDRESSES["memory"],
    policy_address: PolicyAddress = DEFAULT_ADDRESSES["policy"],
    env: EnvAddress = DEFAULT_ADDRESSES["env"],
) -> None:
    """Have a policy merge entries into one text, which is added on probation. The entries stay as they are.

    The text has to prove itself in runs, as any other entry. Exit status: 0 if a text was stored, or could be.

    Example: `mulligan memory consolidate --scope shared --environment frozenlake --limit 5 --dry-run`
    """
    try:
        settings = MergeSettings(
            scope=scope,
            environment=environment,
            key=key,
            kinds=tuple(kind or ()),
            limit=limit,
            strategy=strategy,
            instruction=instruction,
            system=system,
            sampling=SamplingParams(temperature, max_tokens=max_tokens),
            seed=seed,
        )
    except ValueError as error:
        fail(f"--{error}", 2)
    if not run(_consolidate(settings, policy, repeat, dry_run, (memory, policy_address, env))):
        sys.exit(1)


async def _consolidate(
    settings: MergeSettings, policy: str, repeat: int, dry_run: bool, addresses: tuple[str, str, str]
) -> int:
    """How many texts were stored, or could be."""
    written = 0
    async with AsyncExitStack() as stack:
        memory = MemoryClient(endpoint(addresses[0]))
        policies = PolicyClient(endpoint(addresses[1]))
        env = EnvClient(endpoint(addresses[2]))
        for client in (memory, policies, env):
            stack.push_async_callback(client.close)
        prompts = (await env.describe(settings.environment)).prompts
        for number in range(repeat):
            try:
                named = await NamedPolicy.open(policies, policy)
                sources = await sources_of(memory, settings)
                of_several = f" ({number + 1} of {repeat})" if repeat > 1 else ""
                with working(f"{named.info.name or 'the policy'} merges {len(sources)} entries{of_several}"):
                    merged = await merge(named, prompts, sources, settings, number)
                if dry_run:
                    show(merged.text)
                    note(f"not stored; made from {', '.join(entry.reflection_id for entry in sources)}")
                else:
                    identity = await keep(memory, merged, settings)
                    show(f"{identity}  on probation, made from {len(sources)} entries")
                written += 1
            except CannotMerge as error:
                note(f"error: {error}")
    return written
