"""A run whose services are killed at random, again and again: nothing is lost and nothing is counted twice."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mulligan.common.types import Outcome
from mulligan.testing.loop import Loop, is_memorable, small_run
from mulligan.testing.processes import ServiceProcesses

KILLS = 40
STEPS = 400


def kill_at_random(seed: int, folder: Path) -> dict[str, Any]:
    """Kills services at random moments, KILLS times in all. Each is started again at once."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    services = ServiceProcesses(folder)
    try:
        return asyncio.run(_run(services, folder, seed))
    finally:
        services.end()


async def _run(services: ServiceProcesses, folder: Path, seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    loop = Loop.start(services, folder)
    client = loop.client()
    await client.start("killed", small_run(steps=STEPS, seed=seed))
    killed = dict.fromkeys(("env", "policy", "memory", "trainer"), 0)
    start = time.monotonic()
    while sum(killed.values()) < KILLS and (await client.get("killed")).step < STEPS - 5:
        await loop.journal_grows("killed", chance.randrange(1, 40_000))
        victim = chance.choice(list(killed))
        await asyncio.to_thread(getattr(loop, victim).restart)
        killed[victim] += 1
    under_fire = time.monotonic() - start
    await client.stop("killed")
    async for _ in client.watch("killed"):
        pass
    steps = (await client.get("killed")).step
    await client.close()
    chains = [chain for chain in loop.experiences("killed") if chain.step < steps]
    identities = {chain.experience_id for chain in chains}
    solved = [chain.experience_id for chain in chains if is_memorable(chain, threshold=1.0)]
    outcomes = [part.outcome for chain in chains for part in chain.samples]
    result = {
        "kills": killed,
        "seconds_under_fire": round(under_fire),
        "steps": steps,
        "experiences": len(chains),
        "experiences_expected": steps * 4 * 2,
        "counted_twice": len(chains) - len(identities),
        "memory_equals_journal": await loop.memorised("killed") == solved,
        "excluded": sum(not outcome.has_reward for outcome in outcomes),
        "restarted_attempts": sum(c["first"].restarts > 0 for c in chains),
        "outcomes": {str(outcome): outcomes.count(outcome) for outcome in Outcome},
    }
    assert result["experiences"] == result["experiences_expected"] and result["counted_twice"] == 0, result
    assert result["memory_equals_journal"], result
    return result


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    f"kills-{seed}": partial(kill_at_random, seed) for seed in range(5)
}
