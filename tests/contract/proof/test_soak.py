"""A soak of a second, of two services."""

from __future__ import annotations

import asyncio

import pytest

from mulligan.testing.processes import ServiceProcesses
from proof.soak import measure, play, remember


def test_a_soak_of_a_second(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> None:
    lake = {"kind": "frozenlake", "size_min": 3, "size_max": 3, "prompts": "compact"}
    environments = {"frozenlake-3x3": lake, "fenced": {**lake, "untrusted": True}}
    database = tmp_path_factory.mktemp("memory") / "memory.sqlite"
    started = {
        "env": shared_services.start("env", environments=environments),
        "memory": shared_services.start("memory", database=database),
    }
    addresses = {name: service.address for name, service in started.items()}
    processes = {name: service.process.pid for name, service in started.items() if service.process is not None}
    found, done = asyncio.run(measure(processes, addresses, (play, remember), seconds=1.5, every=0.1))
    assert done["episodes"] > 0 and done["entries"] > 0
    for name, one in found.items():
        judged = one.judged(0.5)
        assert judged["memory_mib"]["median"] > 20 and judged["threads"]["median"] > 1, name
    assert found["env"].judged(0.5)["processes"]["median"] >= 1  # what loaded the untrusted environment
