"""Rollouts per second of a whole training of FrozenLake, beside TRL's:
`python -m benchmarks.learner.rollouts [--quick]`.

Both train the embedded model by GRPO as the recipe frozenlake-3x3-rlvr says: the same training boards, rollouts per
step, sampling, limits, loss, optimizer and optimizer steps. Mulligan's four services run as `mulligan demo` runs them.
They are also measured with two settings that GRPOTrainer has not: steps that overlap (`rollout.max_staleness` 1), and
the log-probabilities of sampling in place of those that the learner computes before a step
(`algorithm.recompute_log_probs` false). TRL is one process, with `environment_factory`, transformers' `generate` and as
many threads as torch takes (`benchmarks/learner/trl_rollouts.py`). All take turns on the whole machine. The first step
of each run is not counted, nor what comes before.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import structlog

from benchmarks.common import alternate, median, print_result, print_table, spread
from benchmarks.run import WARM_UP, over_services
from mulligan.cli.local import LocalServices
from mulligan.cli.train import read_settings
from mulligan.trainer.settings import RunSettings

OURS, TRL = "Mulligan", "TRL, environment_factory"
OVERLAPPING = "Mulligan, steps overlap"
AS_SAMPLED = "Mulligan, log-probabilities of sampling"
BOTH = "Mulligan, both"
RECIPE = Path("frozenlake-3x3-rlvr")


def settings_of(steps: int) -> RunSettings:
    """The recipe, so long that `steps` steps are measured, without evaluations in between. It has as many training
    tasks as it plays."""
    overrides = [f"steps={WARM_UP + steps + 1}", "evaluation.every=0", "evaluation.tasks=1", "evaluation.samples=1"]
    settings = read_settings(RECIPE, overrides)
    tasks = settings.steps * settings.rollout.tasks_per_step
    return settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"train_tasks": tasks})})


def overlapping(settings: RunSettings) -> RunSettings:
    """A step is sampled while the one before is learned."""
    return settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"max_staleness": 1})})


def as_sampled(settings: RunSettings) -> RunSettings:
    """The old policy's log-probabilities are those of sampling."""
    algorithm = settings.algorithm.model_copy(update={"recompute_log_probs": False})
    return settings.model_copy(update={"algorithm": algorithm})


def trl(settings: RunSettings, steps: int) -> float:
    """TRL's rollouts per second, measured in a process of its own. Raises CalledProcessError."""
    options = ["--settings", settings.model_dump_json(), "--steps", str(steps), "--warm-up", str(WARM_UP)]
    command = [sys.executable, "-m", "benchmarks.learner.trl_rollouts", *options]
    # The services have it, as each shares the cores with others. TRL's process does not.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return float(printed.splitlines()[-1])


async def rates(steps: int, rounds: int) -> dict[str, list[float]]:
    """The rollouts per second of each way in each round."""
    settings = settings_of(steps)
    numbers = count()
    with tempfile.TemporaryDirectory() as folder:
        async with LocalServices(Path(folder)) as services:

            async def ours(settings: RunSettings) -> float:
                return (await over_services(services, settings, f"run-{next(numbers)}")).rollouts_per_second

            ways: dict[str, Callable[[], Awaitable[float]]] = {
                OURS: partial(ours, settings),
                TRL: partial(asyncio.to_thread, trl, settings, steps),
                OVERLAPPING: partial(ours, overlapping(settings)),
                AS_SAMPLED: partial(ours, as_sampled(settings)),
                BOTH: partial(ours, overlapping(as_sampled(settings))),
            }
            return await alternate(ways, rounds)


def report(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Prints a table. Returns the ratios to TRL, each the median over the rounds, and the rates."""
    rows = [[way, f"{median(values):,.1f}", spread(values)] for way, values in found.items()]
    print_table(["training", "rollouts/s, median", "least–greatest"], rows)

    def ratio(way: str) -> float:
        return round(median([ours / theirs for ours, theirs in zip(found[way], found[TRL], strict=True)]), 2)

    return {
        "trl_rollouts_ratio": ratio(OURS),
        "trl_rollouts_overlapping_ratio": ratio(OVERLAPPING),
        "trl_rollouts_as_sampled_ratio": ratio(AS_SAMPLED),
        "trl_rollouts_both_ratio": ratio(BOTH),
        "rollouts_per_second": round(median(found[OURS]), 1),
        "trl_rollouts_per_second": round(median(found[TRL]), 1),
    }


def measure(*, quick: bool) -> dict[str, float]:
    steps, rounds = (4, 3) if quick else (16, 5)
    return report(asyncio.run(rates(steps, rounds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    print_result("rollouts", measure(quick=arguments.quick))


if __name__ == "__main__":
    main()
