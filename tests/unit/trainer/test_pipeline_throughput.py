"""The loop itself in virtual time, on two machines: one samples completions of very different lengths, the other
learns.

Lengths are 1 to 20 times the shortest. One second is its time. The sampling machine has a slot for each chain of a
step, and a slot is as fast alone as beside others; learning takes as long as its tokens.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import pytest

from mulligan.common.inference import CallOptions, Completion, Prompt, SamplingParams
from mulligan.trainer.data import Datum
from mulligan.trainer.folder import RunFolder
from mulligan.trainer.run import Run, ServicePorts
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.settings import LossSettings, RunSettings
from tests.support.fakes import FakeEnvironment, FakeLearner, FakeMemory, FakePolicy
from tests.support.virtual_time import run_in_virtual_time

CHAINS = 50  # of a step: groups of one
UNIT = 4  # tokens of the shortest completion
LONGEST = 20
TOKENS_PER_SECOND = 100.0  # of the learner: a step takes about half as long as its longest completion
LENGTHS = range(1, LONGEST + 1)
TAIL = [length**-1.3 for length in LENGTHS]


class TwoMachines:
    """A run on them, and when each of its completions was asked for, ended and learned."""

    def __init__(self, folder: Path, ahead: int, steps: int):
        self.asked: list[int] = []  # lengths in tokens, in the order in which they were asked for
        self.ended: list[tuple[float, int]] = []
        self.trained: list[list[int]] = []  # by step
        self.asked_before: list[int] = []  # how many completions were asked for when a step was learned
        self.policy = FakePolicy(lambda system, last, sampling: "x" * (self._length(sampling) - 1))
        self._sample = self.policy.generate
        self.policy.generate = self._generate  # type: ignore[method-assign]
        self.learner = FakeLearner()
        self._learn = self.learner.forward_backward
        self.learner.forward_backward = self._forward_backward  # type: ignore[method-assign]
        settings = RunSettings.model_validate(
            {
                "environment": "fake",
                "steps": steps,
                "checkpoint_every": steps,
                "algorithm": {"name": "rlvr"},
                "rollout": {
                    "tasks_per_step": CHAINS,
                    "rollouts_per_task": 1,
                    "concurrency": CHAINS,
                    "max_staleness": ahead,
                },
                "evaluation": {"every": 0, "samples": 1, "tasks": 1},
                "loss": {"kl_coefficient": 0.1},  # a group of one has no advantage
            }
        )
        self.folder = RunFolder(folder)
        self.folder.create("run", settings)
        self.seconds = run_in_virtual_time(self._train())
        self.per_second = steps / self.seconds

    async def _train(self) -> float:
        environment = FakeEnvironment({f"t{n}": "go" for n in range(200)})

        async def open_learner(run_id: str, settings: RunSettings) -> FakeLearner:
            return self.learner

        await Run("run", self.folder, ServicePorts(environment, self.policy, FakeMemory(), open_learner)).train()
        return asyncio.get_running_loop().time()

    def _length(self, sampling: SamplingParams) -> int:
        generator = random.Random(derive_seed(sampling.seed, "length"))
        return UNIT * generator.choices(LENGTHS, TAIL)[0]

    async def _generate(
        self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = CallOptions()
    ) -> Completion:
        completion = await self._sample(prompt, sampling, options)
        if "evaluation" in options.request_id:
            return completion
        length = len(completion.token_ids)
        self.asked.append(length)
        await asyncio.sleep(length / UNIT)
        self.ended.append((asyncio.get_running_loop().time(), length))
        return completion

    async def _forward_backward(self, data: Sequence[Datum], loss: LossSettings) -> dict[str, float]:
        lengths = [sum(datum.loss_mask) for datum in data]
        self.asked_before.append(len(self.asked))
        self.trained.append(lengths)
        await asyncio.sleep(sum(lengths) / TOKENS_PER_SECOND)
        return await self._learn(data, loss)


def distance(one: Sequence[int], other: Sequence[int]) -> float:
    """Kolmogorov-Smirnov: the largest difference of the two empirical distribution functions."""
    first, second = sorted(one), sorted(other)
    return max(
        abs(bisect_right(first, value) / len(first) - bisect_right(second, value) / len(second))
        for value in {*first, *second}
    )


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory: pytest.TempPathFactory) -> TwoMachines:
    return TwoMachines(tmp_path_factory.mktemp("two") / "run", ahead=2, steps=110)


def test_trained_lengths_are_the_sampled_ones(overlapping: TwoMachines) -> None:
    trained = [length for step in overlapping.trained for length in step]
    assert len(trained) == len(overlapping.asked) == 110 * CHAINS
    assert distance(trained, overlapping.asked) == 0 and max(trained) == LONGEST * min(trained)


def test_nor_does_a_run_that_is_under_way_prefer_short_ones(overlapping: TwoMachines) -> None:
    """What was trained before the last ten steps against all that was asked for by then."""
    trained = [length for step in overlapping.trained[:100] for length in step]
    asked = overlapping.asked[: overlapping.asked_before[100]]
    assert len(trained) >= 5000 and len(asked) > len(trained)
    assert distance(trained, asked) <= 0.03


def test_the_distance_finds_a_loop_that_discards_the_slow(overlapping: TwoMachines) -> None:
    kept = [
        length
        for step in overlapping.trained[:100]
        for length in sorted(step)[: CHAINS * 9 // 10]  # those of a step that end first
    ]
    assert distance(kept, overlapping.asked) > 0.09


@pytest.mark.parametrize("ahead", [1, 2])
def test_the_throughput_is_at_least_1_7_times_that_in_turns(
    tmp_path: Path, overlapping: TwoMachines, ahead: int
) -> None:
    in_turns = TwoMachines(tmp_path / "turns", ahead=0, steps=30)
    found = overlapping if ahead == 2 else TwoMachines(tmp_path / "one", ahead=1, steps=30)
    print(f"S = {ahead}: {found.per_second / in_turns.per_second:.2f} times the steps of S = 0")
    assert found.per_second >= 1.7 * in_turns.per_second
