"""Processes of a learner that are killed, again and again: each time all of them join again.

The processes are started by real torchruns: by two, as on two machines, or by one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mulligan.cli.local import free_ports
from mulligan.trainer.learner.ranks import _OWN_STORE
from tests.support import joining
from tests.support.processes import runs
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Start]:
    """Starts torchrun, whose processes write into `tmp_path/joined`."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*flags: str, own_store: bool) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "10", *flags]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        variables.pop(_OWN_STORE, None)
        with (tmp_path / f"torchrun-{len(started)}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [*command, "-m", joining.__name__, str(tmp_path / "joined")],
                    env={**variables, _OWN_STORE: "1"} if own_store else variables,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        return started[-1]

    yield start
    for process in started:
        process.terminate()
    for process in started:
        process.wait(60)


def two_machines() -> list[str]:
    place = f"127.0.0.1:{free_ports()['trainer']}"
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", "test"]
    return ["--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1", *rendezvous]


def kill_in_turn(file: Path, ranks: Sequence[int]) -> None:
    """Each of these, once all have joined. The first process does not write before it has joined the others, and has
    heard from each of them."""
    seen = 0

    def joined() -> list[list[int]]:
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]

    before: set[int] = set()
    for rank in (*ranks, None):
        wait_until(lambda: len(joined()) > seen and not set(joined()[-1]) & before)  # noqa: B023 - it waits here
        seen = len(joined())
        pids = joined()[-1]
        assert all(map(runs, pids))
        if rank is not None:
            before |= set(pids)
            os.kill(pids[rank], signal.SIGKILL)


def test_on_two_machines_all_join_again_after_any_was_killed(torchrun: Start, tmp_path: Path) -> None:
    flags = two_machines()
    torchruns = [torchrun(*flags, own_store=True) for _ in range(2)]
    kill_in_turn(tmp_path / "joined", (1, 1, 0, 1, 0))
    assert [one.poll() for one in torchruns] == [None, None]


@pytest.mark.parametrize("own_store", [True, False], ids=["as learner_processes", "torchrun by hand"])
def test_on_one_machine_all_join_again_after_any_was_killed(torchrun: Start, tmp_path: Path, own_store: bool) -> None:
    started = torchrun("--standalone", "--nproc-per-node", "3", own_store=own_store)
    kill_in_turn(tmp_path / "joined", (0, 2, 1, 0))
    assert started.poll() is None


def test_on_two_machines_processes_that_would_not_find_each_other_again_do_not_start(
    torchrun: Start, tmp_path: Path
) -> None:
    flags = two_machines()
    torchruns = [torchrun(*flags, own_store=False) for _ in range(2)]
    assert all(one.wait(300) != 0 for one in torchruns)
    logs = [(tmp_path / f"torchrun-{number}.log").read_text() for number in range(2)]
    told = [log.count(f"{_OWN_STORE}: expected 1") for log in logs]
    # The first that ends may take the other one's torchrun with it before that one's process has said anything.
    assert max(told) == 1, f"one says it, and torchrun does not start them again: {told}"
    assert not (tmp_path / "joined").exists()
