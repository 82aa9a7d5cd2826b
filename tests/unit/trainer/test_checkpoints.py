"""When a run saves, and what a kill at any moment costs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mulligan.trainer.checkpoints import CheckpointTimes
from mulligan.trainer.data import Datum
from mulligan.trainer.settings import LossSettings
from tests.support.virtual_time import run_in_virtual_time
from tests.unit.trainer.test_run import Crash, World

STEPS = 12


class TimedWorld(World):
    """Learning takes ten seconds a step, saving some; the trainer may be killed when it has taken an optimizer step."""

    def __init__(self, folder: Path, saving: float, **changes: Any):
        plain: dict[str, Any] = {"steps": STEPS, "checkpoint_every": 10, "keep_checkpoints": 2}
        plain["evaluation"] = {"every": 0, "samples": 1}
        super().__init__(folder, **(plain | changes))
        self.taken = 0  # optimizer steps, over all lives
        self.kill_at = 0
        self.saved: list[int] = []  # optimizer steps in each checkpoint
        step, learn, save = self.learner.optim_step, self.learner.forward_backward, self.learner.save_checkpoint

        async def optim_step() -> dict[str, float]:
            metrics = await step()
            self.taken += 1
            if self.taken == self.kill_at:
                raise Crash
            return metrics

        async def forward_backward(data: Sequence[Datum], loss: LossSettings) -> dict[str, float]:
            await asyncio.sleep(10.0)
            return await learn(data, loss)

        async def save_checkpoint(name: str) -> None:
            await asyncio.sleep(saving)
            await save(name)
            self.saved.append(self.learner.state)

        self.learner.optim_step = optim_step  # type: ignore[method-assign]
        self.learner.forward_backward = forward_backward  # type: ignore[method-assign]
        self.learner.save_checkpoint = save_checkpoint  # type: ignore[method-assign]

    @property
    def rollouts(self) -> int:
        return sum("-s" in episode for episode in self.environment.started)

    def train(self) -> None:
        run_in_virtual_time(self.run().train())


@pytest.mark.parametrize(
    ("saving", "changes", "saved"),
    [
        (0.4, {}, list(range(STEPS + 1))),
        (0.5, {}, list(range(STEPS + 1))),
        (2.0, {}, [0, 4, 8, 10, 12]),
        (60.0, {}, [0, 10, 12]),
        (60.0, {"checkpoint_every": 5}, [0, 5, 10, 12]),
        (0.1, {"keep_checkpoints": 3}, [0, 10, 12]),
    ],
)
def test_a_run_saves_when_it_is_cheap_and_every_so_often(
    tmp_path: Path, saving: float, changes: dict[str, Any], saved: list[int]
) -> None:
    world = TimedWorld(tmp_path, saving, **changes)
    world.train()
    assert sorted(set(world.saved)) == saved and world.taken == STEPS


@pytest.mark.parametrize("kill_at", range(1, STEPS + 1))
def test_a_kill_costs_one_optimizer_step_where_saving_is_cheap(tmp_path: Path, kill_at: int) -> None:
    world = TimedWorld(tmp_path, 0.1)
    world.kill_at = kill_at
    with pytest.raises(Crash):
        world.train()
    world.kill_at = 0
    world.train()
    assert world.run().step == STEPS and world.taken == STEPS + 1
    whole = TimedWorld(tmp_path / "whole", 0.1)
    whole.train()
    assert world.rollouts == whole.rollouts, "and no rollout"


def test_kills_one_after_another_cost_one_optimizer_step_each(tmp_path: Path) -> None:
    """A run that goes on does not know what saving takes. It saves after its first step."""
    world = TimedWorld(tmp_path, 0.1)
    kills = 0
    for kill_at in (2, 4, 6, 8):
        world.kill_at = kill_at
        with pytest.raises(Crash):
            world.train()
        kills += 1
    world.kill_at = 0
    world.train()
    assert world.run().step == STEPS and world.taken <= STEPS + kills


def test_what_is_owed_stays_owed_until_it_is_saved() -> None:
    times = CheckpointTimes(every=3, keep=2)
    times.saved(100.0)
    due = []
    for step in range(1, 8):
        times.stepped(step, 1.0)
        due.append(times.is_due)
    assert due == [False, False, True, True, True, True, True]
    times.saved(100.0)
    assert not times.is_due


def test_time_adds_up_until_saving_is_cheap() -> None:
    times = CheckpointTimes(every=1000, keep=1)
    times.saved(1.0)
    for step in range(1, 20):
        times.stepped(step, 1.0)
        assert not times.is_due
    times.stepped(20, 1.0)
    assert times.is_due
    times.saved(2.0)
    times.stepped(21, 39.0)
    assert not times.is_due
    times.stepped(22, 1.0)
    assert times.is_due
