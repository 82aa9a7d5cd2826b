"""`python -m benchmarks.run [--quick]`: the cost of a training run beyond the model.

The same algorithm runs on the same tasks twice: with four service processes, and in this process alone
(`benchmarks.in_process`). Reported are the rollouts (episodes + reflections) per second of both, their ratio
(`in_process_ratio`), and the share of the services' wall time in which the policy's engine or the learner computes
(`model_share`). The first step of each run is warm-up and not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its waiting threads spin otherwise

import structlog

from benchmarks.common import median, print_result, print_table, spread
from benchmarks.in_process import LocalEnvironment, LocalMemory
from mulligan.cli.local import LocalServices
from mulligan.cli.train import read_settings
from mulligan.env.config import EnvSettings
from mulligan.memory.stores import sqlite
from mulligan.policy.client import PolicyClient
from mulligan.policy.config import PolicySettings
from mulligan.policy.policies import Policies
from mulligan.trainer.client import RunClient
from mulligan.trainer.events import StepEvent
from mulligan.trainer.folder import RunFolder
from mulligan.trainer.learner.client import LearnerClient
from mulligan.trainer.learner.local import LocalLearner
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerSpec
from mulligan.trainer.run import Run, ServicePorts
from mulligan.trainer.settings import RunSettings

WARM_UP = 1  # steps
ENVIRONMENT = "frozenlake-3x3"


@dataclass(frozen=True)
class LoopRates:
    rollouts_per_second: float
    model_share: float | None = None


async def over_services(services: LocalServices, settings: RunSettings, run_id: str) -> LoopRates:
    """Trains one run. Its last step is not measured: it keeps the learner alive while its compute time is read."""
    runs = RunClient(services.endpoint("trainer"))
    policy = PolicyClient(services.endpoint("policy"))
    learner = LearnerClient(services.endpoint("trainer"), run_id, run_id)
    await runs.start(run_id, settings)
    rollouts = start = computed = share = 0.0
    async for entry in runs.watch(run_id):
        if not isinstance(entry.event, StepEvent):
            continue
        step = entry.event.step
        metrics = entry.event.metrics
        if step == WARM_UP - 1:
            start = time.perf_counter()
            computed = (await policy.info()).compute_seconds + await learner.compute_seconds()
        elif WARM_UP <= step < settings.steps - 1:
            rollouts += metrics["rollouts"]
        if step == settings.steps - 2:
            seconds = time.perf_counter() - start
            share = ((await policy.info()).compute_seconds + await learner.compute_seconds() - computed) / seconds
    for client in (runs, policy):
        await client.close()
    return LoopRates(rollouts / seconds, share)


async def in_process(policies: Policies, settings: RunSettings, folder: Path) -> LoopRates:
    async def open_learner(run_id: str, wanted: RunSettings) -> LocalLearner:
        spec = LearnerSpec(wanted.model, wanted.optimizer, wanted.seed, wanted.deterministic)
        server = LearnerServerSettings(folder.parent / "weights", folder / "checkpoints", threads=1)
        return await LocalLearner.create(run_id, spec, server)

    store = await sqlite.open(str(folder / "memory.sqlite"), sqlite.Settings())
    environment = LocalEnvironment({ENVIRONMENT: EnvSettings().create_environments()[ENVIRONMENT]})
    run_folder = RunFolder(folder / "run")
    run_folder.create("run", settings)
    services = ServicePorts(environment, policies, LocalMemory(store), open_learner)
    run = Run("run", run_folder, services)
    await run.train()
    await store.close()
    steps = [event.metrics for step, event in run.events.steps().items() if WARM_UP <= step < settings.steps - 1]
    return LoopRates(sum(step["rollouts"] for step in steps) / sum(step["seconds"] for step in steps))


async def measure(steps: int, rounds: int) -> None:
    recipe = Path("frozenlake-3x3")
    overrides = [f"steps={WARM_UP + steps + 1}", "evaluation.every=0", "evaluation.tasks=1", "evaluation.samples=1"]
    settings = read_settings(recipe, overrides)
    remote: list[LoopRates] = []
    local: list[LoopRates] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "weights").mkdir()
        policy = PolicySettings.model_validate({"weights_folder": folder / "weights", "threads": 1})
        policies = await Policies.open(policy)
        async with LocalServices(folder / "services") as services:
            for number in range(rounds):
                remote.append(await over_services(services, settings, f"round-{number}"))
                (folder / f"local-{number}").mkdir()
                local.append(await in_process(policies, settings, folder / f"local-{number}"))
        await policies.close()
    report(remote, local)


def report(remote: list[LoopRates], local: list[LoopRates]) -> None:
    rates = {
        "four services": [m.rollouts_per_second for m in remote],
        "one process": [m.rollouts_per_second for m in local],
    }
    rows = [[name, f"{median(values):,.0f}", spread(values)] for name, values in rates.items()]
    print_table(["loop", "rollouts/s", "range"], rows)
    ratio = median([a.rollouts_per_second / b.rollouts_per_second for a, b in zip(remote, local, strict=True)])
    share = median([m.model_share for m in remote if m.model_share is not None])
    print(f"\nfour services / one process: {ratio:.2f}; {share:.0%} of the services' time is spent in the model")
    print_result(
        "run",
        {
            "in_process_ratio": round(ratio, 3),
            "model_share": round(share, 3),
            "rollouts_per_second": round(median(rates["four services"]), 1),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within a minute")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    asyncio.run(measure(1, 2) if arguments.quick else measure(12, 5))


if __name__ == "__main__":
    main()
