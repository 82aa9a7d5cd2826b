"""A run whose learner is two processes. Each of them is killed under way, and nothing is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from tests.end_to_end.test_loop import check_experiences, successes
from tests.support.ranks import pids
from tests.support.waiting import until


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_a_run_survives_each_process_of_its_learner(services: ServiceProcesses, tmp_path: Path) -> None:
    loop = Loop.start(services, tmp_path, trainer={"learner_processes": 2, "outage_seconds": 200})
    client = loop.client()
    settings = small_run(steps=5, checkpoint_every=1)
    await client.start("ranked", settings)
    victims = (1, 0)
    for victim in victims:
        await loop.journal_grows("ranked", 20_000)
        before = pids(loop.trainer)
        os.kill(before[victim], signal.SIGKILL)
        await until(lambda before=before: before[0] not in pids(loop.trainer).values())  # type: ignore[misc]
    info = await loop.ended(client, "ranked")
    await client.close()
    assert info.step == 5
    taken = sum(line.get("method") == "OptimStep" and line.get("status") == "OK" for line in loop.trainer.log_lines)
    of_a_step = settings.algorithm.optimizer_steps
    assert 5 * of_a_step <= taken <= (5 + len(victims)) * of_a_step, "a kill costs one step"
    chains = loop.experiences("ranked")
    check_experiences(chains, steps=5, tasks=4, rollouts=2)
    assert await loop.memorised("ranked") == successes(chains)
    loop.trainer.stop()  # torchrun's status is 1 after any signal
    assert loop.trainer.log_lines[-1]["event"] == "stopped"
