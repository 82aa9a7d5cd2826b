"""A training run under faults, and the verdict on it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mulligan.common.access import AccessRole
from mulligan.env.config import EnvSettings
from mulligan.testing.judge import history
from mulligan.testing.judge.cluster import SERVED, Cluster
from mulligan.testing.judge.final import collect
from mulligan.testing.judge.history import Call, Violation
from mulligan.testing.judge.nemesis import TROUBLES, Nemesis
from mulligan.testing.judge.recorder import Recorder, record_calls, to_file
from mulligan.testing.judge.state import Final
from mulligan.testing.judge.strangers import Strangers
from mulligan.testing.judge.verdict import judge
from mulligan.testing.loop import small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.settings import RunSettings

RUN_ID = "judged"
_RUN_SECONDS = 1200.0


def judged_run(**changes: Any) -> RunSettings:
    """It writes the memory and reads it, and draws uses."""
    algorithm = {
        "optimizer_steps": 2,
        "memory_strategy": "latest_success",
        "memory_entries": 2,
        "memory_holdout": 0.3,
        "memory_readers": "both",
        "memory_writes": "all",
    }
    evaluation = {"every": 0, "tasks": 1, "samples": 1}
    return small_run(**({"algorithm": algorithm, "evaluation": evaluation} | changes))


@dataclass(frozen=True, slots=True)
class Trial:
    violations: list[Violation]
    calls: list[Call]
    final: Final
    nemesis: Nemesis
    network: dict[str, int]


async def hold(
    folder: Path,
    settings: RunSettings,
    *,
    seed: int,
    troubles: int,
    kinds: Sequence[str] = TROUBLES,
    plugins: Mapping[str, Sequence[str]] | None = None,
) -> Trial:
    """Trains by these settings while so many troubles happen, of these kinds. `plugins` are those of `launch.py`."""
    chance = random.Random(seed)
    services = ServiceProcesses(folder)
    cluster = Cluster(folder, services, chance, plugins=plugins or {})
    try:
        await cluster.start()
        nemesis = Nemesis(cluster, random.Random(chance.random()), kinds)
        final = await _train(cluster, nemesis, settings, troubles, chance)
    finally:
        await cluster.stop()
    calls = history.read(folder / "history")
    environments = EnvSettings().environments
    model = EnvSettings(environments={settings.environment: environments[settings.environment]}).create_environments()
    happened = {name: dict(network.happened) for name, network in cluster.networks.items()}
    totals = {kind: sum(of.get(kind, 0) for of in happened.values()) for kind in sorted({*sum(map(list, happened.values()), [])})}
    return Trial(judge(calls, final, model), calls, final, nemesis, totals)


async def _train(
    cluster: Cluster, nemesis: Nemesis, settings: RunSettings, troubles: int, chance: random.Random
) -> Final:
    record = Recorder(to_file(cluster.folder / "history" / "strangers.jsonl"), "stranger")
    addresses = {cluster.processes[name].address: served for name, served in SERVED.items()}
    tokens = {role: token for role, token in cluster.tokens.items() if role is not AccessRole.ADMIN}
    strangers = asyncio.create_task(Strangers(addresses, tokens, record, chance).try_on())
    clients = cluster.clients()
    raging = asyncio.create_task(_rage(cluster, nemesis, troubles))
    try:
        async with asyncio.timeout(_RUN_SECONDS):
            await clients[0].start(RUN_ID, settings)
            async for _ in clients[0].watch(RUN_ID):
                pass
            await raging
            return await collect(RUN_ID, settings, (cluster.folder / "runs", cluster.folder / "checkpoints"), clients)
    finally:
        for task in (raging, strangers):
            task.cancel()
        await asyncio.gather(raging, strangers, return_exceptions=True)
        for client in clients:
            await client.close()


async def _rage(cluster: Cluster, nemesis: Nemesis, troubles: int) -> None:
    await nemesis.rage(troubles)
    cluster.calm()
