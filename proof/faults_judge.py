"""Training runs under faults, before a judge: every call is recorded, and the history is compared with a model of
exactly-once steps, policy versions, memory writes, the learner's calls, rewards and authorisation.

What happens to the services says `services/testing/judge/nemesis.py`; what must hold say the modules beside it.
`faults-judge-planted/BUG` has the same services with a bug, of those in `tests/support/planted_bugs.py` and
`further_bugs.py`: the judge must find it.
"""

from __future__ import annotations

import asyncio
import shutil
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from mulligan.testing.judge.network import CallFaults
from mulligan.testing.judge.trial import Adversity, hold, judged_run
from tests.support import further_bugs, planted_bugs

TROUBLES = 12
SEEDS = 5
_PLANTED_TROUBLES = 3
_TROUBLES_OF_FAILURES = 10  # a kill costs an attempt only where one is being played
_PLANTED_STEPS = 4  # the first step finds nothing in the memory
_OF_FAILURES = ("failure_is_reward_zero", "lost_episode_counts_as_cut")
# Every answer to them is lost once, so that each is repeated. None to ReportOutcome: the first answer alone says what
# counted.
_REPEATED = CallFaults(
    lost_once=frozenset(
        {
            *("StartEpisodes", "StepEpisodes", "StepEpisode", "AddReflection", "AddReflections"),
            *("ForwardBackward", "OptimStep"),
        }
    )
)


def judged(seed: int, folder: Path) -> dict[str, Any]:
    _empty(folder)
    settings = judged_run(seed=seed)
    trial = asyncio.run(hold(folder, settings, Adversity(TROUBLES), seed=seed))
    assert not trial.violations, "\n".join(map(str, trial.violations))
    return trial.summary


def planted(module: ModuleType, bug: str, folder: Path) -> dict[str, Any]:
    _empty(folder)
    plugins = {module.HAS[bug]: [f"{module.__name__}:{bug}"]}
    troubles, rollout = _PLANTED_TROUBLES, {}
    if bug in _OF_FAILURES:  # they show when what an env server loses stays lost
        troubles, rollout = _TROUBLES_OF_FAILURES, {"max_restarts": 0}
    adversity = Adversity(troubles, ["kill"], _PLANTED_STEPS, victims=["env"], faults=_REPEATED, plugins=plugins)
    seed = zlib.crc32(bug.encode())
    settings = judged_run(seed=seed, rollout=rollout, evaluation={"every": 2})
    trial = asyncio.run(hold(folder, settings, adversity, seed=seed))
    found_by = sorted({violation.rule for violation in trial.violations} - {"run"})
    assert found_by, f"{bug} was not found"
    return {"bug": bug, "service": module.HAS[bug], "found_by": found_by, "violations": len(trial.violations)}


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{f"faults-judge-{seed}": partial(judged, seed) for seed in range(SEEDS)},
    **{
        f"faults-judge-planted/{bug}": partial(planted, module, bug)
        for module in (planted_bugs, further_bugs)
        for bug in module.BUGS
    },
}
