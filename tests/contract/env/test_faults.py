"""A faulty network and a server that is killed: no wrong answer, no step played twice, no loss in silence.

The same over 100,000 steps: `python -m proof --only faults`.
"""

from __future__ import annotations

import pytest

from mulligan.testing.faulty_play import BrokenPromise, play_under_faults
from mulligan.testing.processes import ServiceProcesses


async def test_every_answer_is_the_right_one_or_a_loss_that_is_told(services: ServiceProcesses) -> None:
    found = await play_under_faults(services, steps=2_500, kills=2, seed=0)
    assert found["steps"] >= 2_500 and found["server_kills"] == 2
    assert found["episodes"] == found["completed"] + sum(found["losses"].values())
    happened = ("connections_cut", "answers_dropped", "delays", "duplicates_answered", "forks")
    assert all(found[name] for name in happened), found


async def test_a_step_that_is_played_twice_is_noticed(services: ServiceProcesses) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await play_under_faults(services, steps=2_500, kills=0, seed=0, twice=7)
    assert all(isinstance(error, BrokenPromise) and "step 6 of" in str(error) for error in caught.value.exceptions)
