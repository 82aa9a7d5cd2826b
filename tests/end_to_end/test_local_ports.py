"""`mulligan up` beside other programs: ports that are taken, and whose log is shown."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mulligan.cli.connection import addresses_from
from mulligan.cli.local import LocalServices, ServiceFailed, _Process, free_ports
from mulligan.cli.up import _addresses
from mulligan.common.channel import is_healthy
from mulligan.env import connect
from mulligan.testing.processes import ServiceProcesses


async def test_ports_that_are_taken_are_named_before_anything_starts(
    services: ServiceProcesses, tmp_path: Path
) -> None:
    """By a healthy service of somebody else, which answers health checks."""
    port = int(services.start("memory").address.rpartition(":")[2])
    local = LocalServices(tmp_path, addresses=addresses_from(port - 2))
    with pytest.raises(ServiceFailed, match=rf"another process listens at 127\.0\.0\.1:{port} \(memory\).*--port-base"):
        await local.__aenter__()
    assert not list((tmp_path / "logs").iterdir())


async def test_a_process_that_ends_is_noticed_though_another_answers_at_its_address(
    services: ServiceProcesses, tmp_path: Path
) -> None:
    """And what is shown of the log is of this start."""
    address = services.start("memory").address
    log = tmp_path / "memory.log"
    log.write_text("an old failure\n")
    process = _Process("memory", address, ["sh", "-c", "echo a new failure; exit 3"], log)
    process.start()
    assert process.process is not None
    await asyncio.to_thread(process.process.wait)
    with pytest.raises(ServiceFailed, match="memory ended at start:\na new failure") as caught:
        await LocalServices(tmp_path)._wait_until_healthy(process)
    assert "old" not in str(caught.value)


async def test_several_env_processes_are_waited_for_at_ports_of_their_own(tmp_path: Path) -> None:
    config = tmp_path / "env.toml"
    config.write_text('processes = 2\n[environments.lake]\nkind = "frozenlake"\n')
    (tmp_path / "logs").mkdir()
    base = min(free_ports().values())
    local = LocalServices(tmp_path, configs={"env": config}, addresses=_addresses(base, config))
    local.tokens.make()
    process = local._processes["env"]
    process.start()
    assert process.process is not None
    try:
        await local._wait_until_healthy(process)
        client = connect(local.endpoint("env"))
        assert [info.name for info in await client.list_environments()] == ["lake"]
        await client.close()
        healthy = [await is_healthy(server) for server in process.servers]
        assert healthy == [True, True] and base not in [int(one.rpartition(":")[2]) for one in process.servers]
    finally:
        process.process.terminate()
        assert await asyncio.to_thread(process.process.wait) == 0


def test_a_port_base_gives_four_ports_in_a_row() -> None:
    assert list(addresses_from(7000).values()) == [f"127.0.0.1:{port}" for port in range(7000, 7004)]
