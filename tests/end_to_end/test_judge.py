"""The four services train under faults, and the judge looks at it. Longer: `python -m proof --only faults-judge`."""

from __future__ import annotations

from pathlib import Path

import pytest

from mulligan.testing.judge.trial import Adversity, hold, judged_run


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_a_run_under_faults_keeps_every_promise(tmp_path: Path) -> None:
    """A service that is killed takes a second to come back; the trainer's disk is full meanwhile."""
    settings = judged_run(rollout={"tasks_per_step": 2})
    adversity = Adversity(2, ("full_disk", "kill"), victims=("env", "memory"))
    trial = await hold(tmp_path, settings, adversity, seed=3)
    assert trial.violations == []
    assert trial.final.state == "stopped", trial.final.error
    summary = trial.summary
    assert sum(summary["troubles"].values()) == 2 and summary["network"]
    assert summary["steps"] >= 1 and summary["calls_of_strangers"] > 10
    assert {call.caller for call in trial.calls} == {"trainer", "driver", "stranger"}
