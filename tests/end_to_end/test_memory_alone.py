"""A run without a learner, over processes: the memory alone makes the embedded model better."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mulligan.cli.app import app
from mulligan.common.channel import Endpoint
from mulligan.memory.client import MemoryClient
from mulligan.policy.client import PolicyClient
from mulligan.testing.loop import Loop
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.events import EvaluationEvent

SMALL = ("steps=3", "evaluation.every=0", "evaluation.tasks=40", "evaluation.samples=1")


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    services = ServiceProcesses(tmp_path_factory.mktemp("logs"), forked=True)
    try:
        yield Loop.start(services, tmp_path_factory.mktemp("loop"))
    finally:
        services.end()


async def weights(loop: Loop) -> Any:
    """The version that serves, and the engine's checksum of its weights."""
    client = PolicyClient(Endpoint(loop.policy.address))
    try:
        versions = await client.versions()
        return (await client.info()).policy_version, [(one.policy_version, one.engine_checksum) for one in versions]
    finally:
        await client.close()


async def learned(loop: Loop, run_id: str) -> Any:
    """Success before and after, and the entries of the memory."""
    client, memory = loop.client(), MemoryClient(Endpoint(loop.memory.address))
    try:
        found = [entry.event async for entry in client.watch(run_id) if isinstance(entry.event, EvaluationEvent)]
        return [event.success for event in found], await memory.list(run_id)
    finally:
        await client.close()
        await memory.close()


@pytest.mark.timeout(300)
def test_first_attempts_rise_while_the_weights_stay(loop: Loop) -> None:
    before = asyncio.run(weights(loop))
    settings = [word for setting in SMALL for word in ("--set", setting)]
    command = ["train", "frozenlake-3x3-memory", *settings, "--run-id", "alone", "--trainer", loop.trainer.address]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    assert "run alone: completed" in told.output and "learner" not in told.output
    (first, last), entries = asyncio.run(learned(loop, "alone"))
    assert first < 0.6 and last > 0.8, "0.31 and 0.99 on all test tasks"
    assert asyncio.run(weights(loop)) == before
    assert not _files(loop.folder / "weights") and not _files(loop.folder / "checkpoints")
    chains = loop.experiences("alone")
    read = [chain for chain in chains if chain.memory_use_id]
    assert len(chains) == 24 and len(read) == 16, "the first step finds no entry"
    known = {entry.reflection_id for entry in entries}
    assert {shown for chain in read for shown in chain.memory_entry_ids} <= known
    assert sum(entry.uplift.uses_shown + entry.uplift.uses_left_out for entry in entries if entry.uplift) == 16


def _files(folder: Path) -> list[Path]:
    """Without the locks of the service that writes there."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
