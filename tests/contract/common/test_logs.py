"""A log that cannot be written fails no call: of a real server, whose log is cut off while it serves."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from mulligan.cli.local import free_ports
from mulligan.common.channel import Endpoint
from mulligan.common.logs import LINE_LIMIT, VALUE_LIMIT
from mulligan.env.client import EnvClient
from mulligan.testing.processes import ServiceProcesses
from tests.support.environments import __name__ as environments
from tests.support.paths import IMPORT_ROOTS, ROOT
from tests.support.waiting import wait_until

AWKWARD = {"awkward": {"kind": environments}}


async def play(address: str, name: str) -> None:
    """Calls of which each takes effect: a step that had failed could not be followed by the next."""
    client = EnvClient(Endpoint(address, outage_seconds=200))
    try:
        for number in range(5):
            episode = await client.start("awkward", "good", f"{name}-{number}")
            for step in range(1, 5):
                assert (await episode.step("a")).observation == f"{step}: a"
    finally:
        await client.close()


def lost_by_the_metric(address: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics") as page:
        found = re.search(r"^mulligan_log_lines_lost_total (.+)$", page.read().decode(), re.MULTILINE)
    assert found
    return float(found[1])


async def test_a_full_disk(services: ServiceProcesses) -> None:
    """As a limit on the size of files, under which a line may be written in part, too."""
    server = services.start("env", environments=AWKWARD, metrics_port=0)
    assert server.process is not None
    [metrics] = [line["address"] for line in server.log_lines if line["event"] == "metrics"]
    await play(server.address, "before")
    unlimited = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (server.log_path.stat().st_size + 40, unlimited[1]))
    await play(server.address, "full")
    assert server.is_healthy()
    wait_until(lambda: lost_by_the_metric(metrics) > 0)
    torn = server.log.rpartition("\n")[2]
    assert 0 < len(torn) <= 40
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)
    await play(server.address, "after")
    wait_until(lambda: '"log lines were lost"' in server.log)
    lines = server.log.rpartition("\n")[0].splitlines()
    assert lines.count(torn) == 1, "what was torn is a line of its own"
    whole = [json.loads(line) for line in lines if line != torn]
    [said] = [line for line in whole if line["event"] == "log lines were lost"]
    assert said["lines"] == lost_by_the_metric(metrics) and "OSError" in said["cause"]


def closed() -> dict[str, Any]:
    return {"preexec_fn": partial(os.close, 2)}


def full() -> dict[str, Any]:
    return {"stderr": os.open("/dev/full", os.O_WRONLY)}


def pipe_that_nobody_reads() -> dict[str, Any]:
    reading, writing = os.pipe()
    os.close(reading)
    return {"stderr": writing}


@pytest.mark.parametrize("stderr", [closed, full, pipe_that_nobody_reads], ids=lambda stderr: stderr.__name__)
def test_no_log_at_all(stderr: Callable[[], dict[str, Any]]) -> None:
    """From the beginning, so that the address is not told either."""
    port = free_ports()["env"]
    command = [sys.executable, "-m", "mulligan.env", "--port", str(port), "--environments", json.dumps(AWKWARD)]
    options = stderr()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": IMPORT_ROOTS}, **options)
    try:
        asyncio.run(play(f"127.0.0.1:{port}", "unseen"))
        assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        if "stderr" in options:
            os.close(options["stderr"])


async def test_lines_are_short(services: ServiceProcesses) -> None:
    server = services.start("env", environments=AWKWARD)
    client = EnvClient(Endpoint(server.address))
    for name in ("x" * 4_000_000, "\x00" * 1_000_000, "🧊" * 1_000_000):
        with pytest.raises(Exception, match="INVALID_FIELD"):
            await client.start("awkward", "good", name)
    await client.close()
    wait_until(lambda: server.log.count("INVALID_FIELD") == 3)
    lines = [line for line in server.log_lines if line.get("reason") == "INVALID_FIELD"]
    assert [line["episode_id"][0] for line in lines] == ["x", "\x00", "🧊"]
    assert all(len(json.dumps(line["episode_id"])) <= VALUE_LIMIT + 2 for line in lines)
    assert max(map(len, server.log.splitlines())) < LINE_LIMIT
