"""A run whose services speak TLS alone, each with a certificate for its own name and roles from certificates. Its
memory and its learner ask for its credential."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mulligan.cli.app import app
from mulligan.common.access import AccessRole
from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.tls import ClientTls
from mulligan.memory.client import MemoryClient
from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.client import RunClient
from mulligan.trainer.folder import RunState
from tests.support.certificate import Authority
from tests.support.run_keys import write_keys

SECONDS = 500.0


def server(authority: Authority, name: str) -> dict[str, Any]:
    """Its certificate is for its name, not for the address that it is bound to."""
    key, certificate = authority.issue(name, name)
    return {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": authority.ca}


def client(authority: Authority, name: str, role: AccessRole) -> dict[str, Any]:
    tls = authority.client(role)
    parts = {"ca": tls.ca, "name": name, "cert": tls.cert, "key": tls.key}
    return {f"{name}_tls_{part}": value for part, value in parts.items()}


async def test_a_run_goes_over_tls(services: ServiceProcesses, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    settings = {name: server(authority, name) for name in ("env", "policy", "memory", "trainer")}
    for name, role in (("env", AccessRole.ACTOR), ("policy", AccessRole.TRAINER), ("memory", AccessRole.ACTOR)):
        settings["trainer"] |= client(authority, name, role)
    private, public = write_keys(tmp_path)
    settings["memory"]["run_keys"], settings["trainer"]["run_keys"] = public, private
    env, policy, memory, trainer = settings.values()
    start = partial(Loop.start, services, tmp_path, env=env, policy=policy, memory=memory, trainer=trainer)
    loop = await asyncio.to_thread(start)
    tls = authority.client(AccessRole.TRAINER, "trainer")
    runs = RunClient(Endpoint(loop.trainer.address, tls=tls, outage_seconds=60))
    await runs.start("over-tls", small_run(steps=1, algorithm={"memory_episodes": 1}))
    await loop.ended(runs, "over-tls", SECONDS)
    await runs.close()
    stranger = MemoryClient(Endpoint(loop.memory.address, tls=authority.client(AccessRole.TRAINER, "memory")))
    written = await stranger.list("over-tls")
    assert written and {entry.provenance.run_id for entry in written} == {"over-tls"}
    with pytest.raises(DomainError) as caught:
        await stranger.delete(written[0].reflection_id)
    assert caught.value.reason is Reason.RUN_CREDENTIAL
    await stranger.close()

    def listed(tls: ClientTls) -> str:
        names = {"CA": tls.ca, "NAME": tls.name, "CERT": tls.cert, "KEY": tls.key}
        variables = {f"MULLIGAN_CLI_TLS_{part}": str(value or "") for part, value in names.items()}
        command = ["runs", "--trainer", loop.trainer.address]
        result = CliRunner().invoke(app, command, env=variables | {"COLUMNS": "200"})
        return f"{result.exit_code} {result.output}"

    shown = await asyncio.to_thread(listed, tls)
    assert shown.startswith("0 ") and "over-tls" in shown and RunState.COMPLETED.lower() in shown.lower()
    assert "BAD_CREDENTIAL" in await asyncio.to_thread(listed, authority.client(None, "trainer"))
