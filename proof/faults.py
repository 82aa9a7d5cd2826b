"""Episodes under faults: dropped answers, duplicated calls, delays, and a server that is killed.

Every answer must belong to its episode, no step may be played twice, and every loss must be reported.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mulligan.testing.faulty_play import play_under_faults
from mulligan.testing.processes import ServiceProcesses

STEPS = 25_000  # of one case; five cases are more than 100,000
KILLS = 12


def play(seed: int, folder: Path) -> dict[str, Any]:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    services = ServiceProcesses(folder)
    try:
        found = asyncio.run(play_under_faults(services, steps=STEPS, kills=KILLS, seed=seed))
    finally:
        services.end()
    assert found["episodes"] == found["completed"] + sum(found["losses"].values()), found
    assert found["server_kills"] == KILLS and found["connections_cut"] > KILLS, found
    return found


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {f"faults-{seed}": partial(play, seed) for seed in range(5)}
