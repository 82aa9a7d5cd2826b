"""Whether merging entries lowers success: the memory of a short run without a learner, before and after ten merges.

Two ways are compared. *Kept apart*: each merge reads the entries that help most by their evidence, and is a candidate
without evidence. *Believed*: each merge reads what is newest, its forerunners among it, as a memory does that takes
every text for an improvement. Attempts read the memory as of a version, so before and after are the same boards, seeds
and policy.

After 8 steps no entry has evidence enough for an interval that begins above -1, after 60 steps one has. What helps
most is the latest entry until then.

The embedded model follows no instruction. It reads its reflection prompt: the trace of an attempt, and a legend from
the memory. What it is told is such a prompt, with two legends in the place of one; each merge gets another trace.
"""

from __future__ import annotations

import asyncio
import shutil
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

from mulligan.cli.recipes import recipe_file
from mulligan.common.channel import Endpoint
from mulligan.common.experience import Sample
from mulligan.common.inference import SamplingParams
from mulligan.common.reflections import RetrievalStrategy
from mulligan.common.types import Split
from mulligan.env.client import EnvClient
from mulligan.memory.client import MemoryClient
from mulligan.policy.client import PolicyClient
from mulligan.testing.loop import Loop
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.consolidation import CannotMerge, MergeSettings, keep, merge, sources_of
from mulligan.trainer.evaluation import evaluate
from mulligan.trainer.harness import Harness
from mulligan.trainer.player import Player
from mulligan.trainer.recall import Recall
from mulligan.trainer.sampling import NamedPolicy
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.texts import reflection_request
from proof.second_attempts import kind

RUN = "filled"
SEED = 0
BOUND = -0.03  # of the paired difference's lower end
CONFIDENCE = 0.95
READINGS: dict[str, dict[str, Any]] = {
    "best_uplift": {"memory_strategy": "best_uplift", "memory_entries": 1},
    "mix": {
        "memory_strategy": "mix",
        "memory_mix": [{"strategy": "best_uplift", "limit": 1}, {"strategy": "explore", "limit": 1}],
    },
    "newest": {"memory_strategy": "explore", "memory_entries": 1},  # among those with the fewest uses
}


@dataclass(frozen=True)
class Size:
    """`boards` 0: all test boards."""

    steps: int
    boards: int = 0
    samples: int = 8
    merges: int = 10


@dataclass
class World:
    """The services after the run, as callers see them. `plain` are the run's settings, `traces` attempts of it."""

    env: EnvClient
    policies: PolicyClient
    memory: MemoryClient
    plain: dict[str, Any]
    harness: Harness
    traces: Sequence[Sample]
    size: Size

    @classmethod
    async def open(cls, loop: Loop, plain: dict[str, Any], size: Size) -> World:
        env, policies, memory = (
            EnvClient(Endpoint(loop.env.address)),
            PolicyClient(Endpoint(loop.policy.address)),
            MemoryClient(Endpoint(loop.memory.address)),
        )
        info = await env.describe(plain["environment"])
        named = await NamedPolicy.open(policies, "")
        harness = Harness(env, named, info, named.info, "0", 3)
        traces = [one.samples[0] for one in loop.experiences(RUN) if one.samples[0].reward is not None]
        return cls(env, policies, memory, plain, harness, traces, size)

    async def close(self) -> None:
        for client in (self.env, self.policies, self.memory):
            await client.close()

    async def merge(self, number: int, *, believed: bool) -> str:
        """What became of one merge: the kind of the legend that was stored, or why none was."""
        prompts, rollout = self.harness.info.prompts, RunSettings.model_validate(self.plain).rollout
        settings = MergeSettings(
            scope=RUN,
            environment=self.harness.info.name,
            limit=2,
            strategy=RetrievalStrategy.EXPLORE if believed else RetrievalStrategy.BEST_UPLIFT,
            unproved=believed,
            instruction=reflection_request(self.traces[number % len(self.traces)], prompts, ["{texts}"]),
            system=prompts.reflection_system,
            sampling=SamplingParams(
                rollout.reflection_temperature, rollout.reflection_top_p, max_tokens=rollout.reflection_max_tokens
            ),
            seed=SEED,
        )
        policy = await NamedPolicy.open(self.policies, "")
        try:
            merged = await merge(policy, prompts, await sources_of(self.memory, settings), settings, number)
            await keep(self.memory, merged, settings)
        except CannotMerge as error:
            return f"not stored: {error}"
        return kind(merged.text)

    async def success(self, reading: str, version: int) -> list[float]:
        """Of each board, over its samples, when first attempts read the memory as of the version."""
        algorithm = self.plain["algorithm"] | READINGS[reading]
        run = RunSettings.model_validate(self.plain | {"algorithm": algorithm})
        tasks = await self.env.list_tasks(run.environment, Split.TEST, self.size.boards)
        recall = Recall(self.memory, run, RUN, version)
        name = f"{reading}-{version}"
        player = Player(self.harness, tasks, run.evaluation, run.rollout, SEED, name=name, recall=recall)
        rewards = [attempt.reward for attempt in await evaluate(player)]
        known = [reward for reward in rewards if reward is not None]
        if len(known) < len(rewards):
            raise RuntimeError(f"{len(rewards) - len(known)} attempts were not finished: the services' logs say why")
        samples = self.size.samples
        return [fmean(known[place : place + samples]) for place in range(0, len(known), samples)]


def measure(size: Size, folder: Path) -> dict[str, Any]:
    """Begins anew after an interruption."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plain = tomllib.loads(recipe_file(Path("frozenlake-3x3-memory")).read_text())
    # Failed legends are kept, too, so that there is more than one to merge.
    plain["algorithm"]["memory_writes"] = "all"
    plain |= {"steps": size.steps, "seed": SEED}
    plain["evaluation"] = {"every": 0, "tasks": 1, "samples": size.samples}
    services = ServiceProcesses(folder)
    try:
        return asyncio.run(_measure(Loop.start(services, folder / "loop"), plain, size))
    finally:
        services.end()


async def _measure(loop: Loop, plain: dict[str, Any], size: Size) -> dict[str, Any]:
    await loop.train(RUN, RunSettings.model_validate(plain))
    world = await World.open(loop, plain, size)
    try:
        entries = await world.memory.list(RUN)
        versions = {"before": await world.memory.snapshot(RUN)}
        apart = [await world.merge(number, believed=False) for number in range(size.merges)]
        versions["after"] = await world.memory.snapshot(RUN)
        believed = [await world.merge(number, believed=True) for number in range(size.merges)]
        versions["believed"] = await world.memory.snapshot(RUN)
        success = {
            reading: {when: await world.success(reading, version) for when, version in versions.items()}
            for reading in READINGS
        }
    finally:
        await world.close()
    differences = {
        reading: {when: paired(boards["before"], boards[when]) for when in ("after", "believed")}
        for reading, boards in success.items()
    }
    return {
        "steps": size.steps,
        "boards": len(success["newest"]["before"]),
        "samples": size.samples,
        "entries": [{"legend": kind(one.text), "uplift": one.uplift and one.uplift.lower} for one in entries],
        "merges": {"kept_apart": apart, "believed": believed},
        "success": {
            reading: {when: round(fmean(boards), 4) for when, boards in found.items()}
            for reading, found in success.items()
        },
        "differences": differences,
        "not_lowered": {
            reading: {when: found["lower"] > BOUND for when, found in when_read.items()}
            for reading, when_read in differences.items()
        },
    }


def paired(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """The mean of the boards' differences with its interval of 95 %, by the normal distribution: for some 30 boards or
    more. Needs two."""
    differences = [second - first for first, second in zip(before, after, strict=True)]
    mean = fmean(differences)
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * stdev(differences) / sqrt(len(differences))
    return {"difference": round(mean, 4), "lower": round(mean - half, 4), "upper": round(mean + half, 4)}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    f"consolidation-{steps}": partial(measure, Size(steps)) for steps in (8, 60)
}
