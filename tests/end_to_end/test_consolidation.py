"""Merging entries over processes: the command with the embedded model, and a small case of the proof."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mulligan.cli.app import app
from mulligan.common.channel import Endpoint
from mulligan.common.reflections import Provenance, ReflectionStatus, StoredReflection
from mulligan.memory.client import MemoryClient
from mulligan.testing.loop import Loop
from mulligan.testing.processes import ServiceProcesses
from proof.consolidation import READINGS, Size, measure

LEGENDS = ("A player\nC goal\nB hole\nD floor", "B player\nA goal\nC hole\nD floor")  # both are wrong
ORIGIN = Provenance("run", "experience", "frozenlake-3x3", "train/00001", 0, 0.0, 1.0, True)
# What the embedded model reads: a trace and feedback, then the memory.
INSTRUCTION = "A\tB\tD\nD\tC\tD\nD\tD\tD\nRight\nD\t√\tD\nD\tC\tD\nD\tD\tD\nreached goal\n{texts}"


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    services = ServiceProcesses(tmp_path_factory.mktemp("logs"), forked=True)
    try:
        yield Loop.start(services, tmp_path_factory.mktemp("loop"))
    finally:
        services.end()


def entries(loop: Loop, *new: str) -> list[StoredReflection]:
    """Those of the scope "shared", after the new ones were added."""

    async def main() -> list[StoredReflection]:
        client = MemoryClient(Endpoint(loop.memory.address))
        try:
            for text in new:
                await client.add(text, "shared", text, ORIGIN)
            return await client.list("shared")
        finally:
            await client.close()

    return asyncio.run(main())


@pytest.fixture
def command(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("MULLIGAN_CLI_MEMORY", loop.memory.address)
    monkeypatch.setenv("MULLIGAN_CLI_POLICY", loop.policy.address)
    monkeypatch.setenv("MULLIGAN_CLI_ENV", loop.env.address)

    def run(*arguments: str, status: int = 0) -> Result:
        whole = ["memory", "consolidate", "--scope", "shared", "--environment", "frozenlake-3x3", *arguments]
        result = CliRunner().invoke(app, whole)
        assert result.exit_code == status, result.output
        return result

    return run


def test_entries_are_merged_by_the_policy_that_serves(loop: Loop, command: Callable[..., Result]) -> None:
    refused = command("--instruction", "merge them", status=2).stderr
    assert "--instruction: expected {entries} or {texts}" in refused
    assert "has 0 entries of 'frozenlake-3x3'" in command(status=1).stderr
    sources = entries(loop, "of long ago", *LEGENDS)
    told = ("--limit", "2", "--system", "explain", "--instruction", INSTRUCTION, "--max-tokens", "32", "--repeat", "6")
    tried = command(*told, "--dry-run")
    assert "not stored; made from" in tried.stderr and len(entries(loop)) == 3
    done = command(*told)
    stored = [entry for entry in entries(loop) if entry not in sources]
    assert stored and {entry.reflection_id for entry in stored} == {
        line.split()[0] for line in done.stdout.splitlines()
    }
    for entry in stored:
        assert entry.status is ReflectionStatus.PROBATION and not entry.provenance.success
        assert entry.source_ids == (sources[2].reflection_id, sources[1].reflection_id), "the latest first"
        assert entry.text in tried.stdout, "the same seeds"
    assert command(*told).stdout == done.stdout and len(entries(loop)) == 3 + len(stored), "a repeated command"


def test_cut_answers_and_wrong_names_are_told(loop: Loop, command: Callable[..., Result]) -> None:
    entries(loop, *LEGENDS)
    before = len(entries(loop))
    told = ("--system", "explain", "--instruction", INSTRUCTION)
    assert "cut after 1 tokens" in command(*told, "--max-tokens", "1", status=1).stderr
    assert "nobody" in command(*told, "--policy", "nobody", status=1).stderr
    wrong = CliRunner().invoke(app, ["memory", "consolidate", "--scope", "shared", "--environment", "frozenlake-3x33"])
    assert wrong.exit_code == 1 and "frozenlake-3x3" in wrong.stderr
    assert len(entries(loop)) == before


@pytest.mark.timeout(300)
def test_the_proof_on_a_few_boards(tmp_path: Path) -> None:
    found = measure(Size(steps=2, boards=4, samples=1, merges=2), tmp_path / "proof")
    assert found["boards"] == 4 and len(found["merges"]["kept_apart"]) == len(found["merges"]["believed"]) == 2
    assert found["entries"] and set(found["success"]) == set(READINGS)
    for reading, success in found["success"].items():
        for when, difference in found["differences"][reading].items():
            assert difference["lower"] <= difference["difference"] <= difference["upper"]
            assert difference["difference"] == pytest.approx(success[when] - success["before"], abs=1e-3)
            assert found["not_lowered"][reading][when] == (difference["lower"] > -0.03)
