"""The memory under crashes: concurrent additions, revisions, reports, deletions and erasures, and a service that is
killed again and again, or a disk that loses what was not synced.

No acknowledged write is lost, no write is there in half, a use counts once, and versions have no gaps:
`services/testing/memory_ledger.py` checks it. What a loss of power is says `services/testing/power_loss.py`.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mulligan.testing.memory_ledger import check_sqlite
from mulligan.testing.memory_writers import DATABASE, write_and_lose_power, write_under_kills
from mulligan.testing.power_loss import CannotRecord
from mulligan.testing.processes import ServiceProcesses
from proof import CaseUnavailable

KILLS = 40  # of one case
LOSSES = 300
CALLS = 600  # that are recorded


def kill_at_random(seed: int, folder: Path) -> dict[str, Any]:
    _empty(folder)
    services = ServiceProcesses(folder)
    database = folder / DATABASE
    try:
        server = services.start("memory", database=database)
        check = partial(check_sqlite, database)
        return asyncio.run(write_under_kills(server, check, kills=KILLS, seed=seed))
    finally:
        services.end()


def lose_power(seed: int, folder: Path) -> dict[str, Any]:
    _empty(folder)
    try:
        return asyncio.run(write_and_lose_power(folder, calls=CALLS, losses=LOSSES, seed=seed))
    except CannotRecord as error:
        raise CaseUnavailable(str(error)) from error


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{f"memory-crashes/kills-{seed}": partial(kill_at_random, seed) for seed in range(10)},
    **{f"memory-crashes/power-{seed}": partial(lose_power, seed) for seed in range(5)},
}
