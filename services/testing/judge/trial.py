"""A training run under faults, and the verdict on it."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mulligan.common.access import AccessRole
from mulligan.common.experience import Sample
from mulligan.env.config import EnvSettings
from mulligan.testing.judge import history
from mulligan.testing.judge.access import NO_RUN, OTHER_RUN
from mulligan.testing.judge.cluster import NAMES, SERVED, Cluster
from mulligan.testing.judge.final import collect
from mulligan.testing.judge.history import BrokenRule, RecordedCall
from mulligan.testing.judge.intruders import Intruders
from mulligan.testing.judge.nemesis import TROUBLES, Nemesis
from mulligan.testing.judge.network import CallFaults
from mulligan.testing.judge.recorder import CallRecorder, recorded, to_file
from mulligan.testing.judge.replayed import ReplayedLearner
from mulligan.testing.judge.state import Final
from mulligan.testing.judge.strangers import Strangers
from mulligan.testing.judge.verdict import judge
from mulligan.testing.loop import small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.client import RunClient
from mulligan.trainer.settings import RunSettings

RUN_ID = "judged"
_RUN_SECONDS = 3600.0
_LOOK_SECONDS = 0.2  # between two looks at a run


def judged_run(**changes: Any) -> RunSettings:
    """It writes the memory and reads it, and draws uses. It goes on until it is stopped."""
    algorithm = {
        "optimizer_steps": 2,
        "memory_strategy": "latest_success",
        "memory_entries": 2,
        "memory_holdout": 0.3,
        "memory_readers": "reflector",
        "memory_writes": "all",
    }
    evaluation = {"every": 0, "tasks": 1, "samples": 1}
    return small_run(**({"steps": 1000, "algorithm": algorithm, "evaluation": evaluation} | changes))


@dataclass(frozen=True, slots=True)
class JudgedRun:
    violations: list[BrokenRule]
    calls: list[RecordedCall]
    final: Final
    nemesis: Nemesis
    network: dict[str, int]

    @property
    def summary(self) -> dict[str, Any]:
        """In numbers."""
        strangers = [call for call in self.calls if call.credential]
        return {
            "troubles": dict(sorted(self.nemesis.happened.items())),
            "not_possible_here": self.nemesis.lacking,
            "files_lost_with_power": self.nemesis.files_lost,
            "network": self.network,
            "steps": self.final.steps,
            "experiences": len(self.final.experiences),
            "restarted_attempts": sum(sample.restarts > 0 for sample in self._samples),
            "excluded": sum(not sample.outcome.has_reward for sample in self._samples),
            "memory_entries": len(self.final.entries),
            "memory_uses": len({use.use_id for of in self.final.uses.values() for use in of}),
            "policy_versions": len(self.final.versions),
            "calls": len(self.calls) - len(strangers),
            "calls_without_answer": sum(not call.ok and not call.refused for call in self.calls if not call.credential),
            "calls_of_strangers": len(strangers),
            "calls_without_credential_of_the_run": sum(call.credential in (NO_RUN, OTHER_RUN) for call in strangers),
            "violations": [str(violation) for violation in self.violations],
        }

    @property
    def _samples(self) -> list[Sample]:
        return [sample for experience in self.final.experiences for sample in experience.samples]


@dataclass(frozen=True, slots=True)
class Adversity:
    """So many troubles, of these kinds. `victims` are the services that are killed or cut off, `faults` those of the
    network, `plugins` those of `launch.py`, by service. The run trains at least `steps` steps."""

    troubles: int
    kinds: Sequence[str] = TROUBLES
    steps: int = 0
    victims: Sequence[str] = NAMES
    faults: CallFaults = CallFaults()
    plugins: Mapping[str, Sequence[str]] = field(default_factory=dict)


async def hold(folder: Path, settings: RunSettings, adversity: Adversity, *, seed: int) -> JudgedRun:
    """Trains by these settings, until all troubles have happened, a step after them is trained, and not fewer than
    `adversity.steps`, and the strangers have made each call, or the run has ended."""
    chance = random.Random(seed)
    services = ServiceProcesses(folder)
    cluster = Cluster(folder, services, chance, adversity.faults, adversity.plugins)
    driver = CallRecorder(to_file(folder / "history" / "driver.jsonl"), "driver")
    try:
        await cluster.start()
        nemesis = Nemesis(cluster, random.Random(chance.random()), adversity.kinds, adversity.victims)
        with recorded(driver):
            final = await _train(cluster, nemesis, settings, adversity, chance)
    finally:
        await cluster.stop()
    calls = history.read(folder / "history")
    environments = EnvSettings().environments
    model = EnvSettings(environments={settings.environment: environments[settings.environment]}).create_environments()
    network = sum((network.happened for network in cluster.networks.values()), Counter())
    with tempfile.TemporaryDirectory(dir=folder) as place:
        violations = judge(calls, final, model, partial(ReplayedLearner, Path(place)))
    return JudgedRun(violations, calls, final, nemesis, dict(sorted(network.items())))


async def _train(
    cluster: Cluster, nemesis: Nemesis, settings: RunSettings, adversity: Adversity, chance: random.Random
) -> Final:
    record = CallRecorder(to_file(cluster.folder / "history" / "strangers.jsonl"), "stranger")
    addresses = {cluster.processes[name].address: served for name, served in SERVED.items()}
    tokens: dict[AccessRole, str] = {
        role: token for role, token in cluster.tokens.items() if role is not AccessRole.ADMIN
    }
    clients = cluster.clients(RUN_ID)
    folders = (cluster.folder / "runs", cluster.folder / "checkpoints")
    try:
        async with asyncio.timeout(_RUN_SECONDS), asyncio.TaskGroup() as group:
            intruders = Intruders(RUN_ID, cluster.tokens[AccessRole.TRAINER], cluster.keys, chance)
            trying = Strangers(addresses, tokens, record, chance, intruders, ca=cluster.ca.read_bytes())
            strangers = group.create_task(trying.try_on())
            await clients[0].start(RUN_ID, settings)
            raging = group.create_task(nemesis.rage(adversity.troubles))
            running = group.create_task(_ended(clients[0]))
            await asyncio.wait([raging, running], return_when=asyncio.FIRST_COMPLETED)
            cluster.calm()
            if not running.done():
                await _another_step(clients[0], running, adversity.steps)
                tried = group.create_task(trying.tried_each_call.wait())
                await asyncio.wait([tried, running], return_when=asyncio.FIRST_COMPLETED)
                tried.cancel()
                await clients[0].stop(RUN_ID)
            await running
            for task in (raging, strangers):
                task.cancel()
        return await collect(RUN_ID, settings, folders, clients)
    finally:
        for client in clients:
            await client.close()


async def _another_step(client: RunClient, running: asyncio.Task[None], least: int) -> None:
    """Waits until the run has trained a step more and at least `least`, or has ended. A run that begins again at its
    checkpoint has trained fewer for a while."""
    enough = max((await client.get(RUN_ID)).step + 1, least)
    while not running.done() and (await client.get(RUN_ID)).step < enough:  # noqa: ASYNC110 - in another process
        await asyncio.sleep(_LOOK_SECONDS)


async def _ended(client: RunClient) -> None:
    async for _ in client.watch(RUN_ID):
        pass
