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
from mulligan.common.reflections import Labels, Provenance, ReflectionKind
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
    assert first < 0.6 and last >= 0.85, "0.31 and 0.99 on all test tasks"
    assert asyncio.run(weights(loop)) == before
    assert not _files(loop.folder / "weights") and not _files(loop.folder / "checkpoints")
    chains = loop.experiences("alone")
    read = [chain for chain in chains if chain.memory_use_id]
    assert len(chains) == 24 and len(read) == 16, "the first step finds no entry"
    known = {entry.reflection_id for entry in entries}
    assert {shown for chain in read for shown in chain.memory_entry_ids} <= known
    assert sum(entry.uplift.uses_shown + entry.uplift.uses_left_out for entry in entries if entry.uplift) == 16


async def write_manual(loop: Loop, run_id: str) -> str:
    """A document of the recipe's key that misleads, before the run. Its id."""
    memory = MemoryClient(Endpoint(loop.memory.address))
    origin = Provenance("", "", "frozenlake-3x3", "", 0, 0.0, 0.0, success=False)
    labels = Labels(ReflectionKind.DOCUMENT, "frozenlake", ("manual",))
    try:
        return await memory.add("manual", run_id, "A hole\nB player\nC floor\nD goal", origin, labels)
    finally:
        await memory.close()


@pytest.mark.timeout(300)
def test_a_run_rewrites_a_document_and_first_attempts_rise(loop: Loop) -> None:
    before = asyncio.run(weights(loop))
    manual = asyncio.run(write_manual(loop, "draft"))
    settings = [word for setting in (*SMALL, "algorithm.memory_holdout=0.0") for word in ("--set", setting)]
    command = ["train", "frozenlake-3x3-document", *settings, "--run-id", "draft", "--trainer", loop.trainer.address]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    (first, last), (document,) = asyncio.run(learned(loop, "draft"))
    assert first < 0.6 and last > 0.8
    assert asyncio.run(weights(loop)) == before
    assert document.reflection_id == manual and document.revision >= 2
    kept, own = document.tags
    assert kept == "manual" and own.startswith("run:draft@")
    chains = loop.experiences("draft")
    assert {chain.memory_entry_ids for chain in chains} == {(manual,)}
    written = {chain["reflection"].text for chain in chains if chain.sample("reflection")}
    systems = {step: {chain["first"].system for chain in chains if chain.step == step} for step in range(3)}
    assert all("A hole" in system for system in systems[0]) and document.text in written
    assert all(any(text in system for text in written) for system in systems[2])


def _files(folder: Path) -> list[Path]:
    """Without the locks of the service that writes there."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
