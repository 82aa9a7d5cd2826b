"""`mulligan memory` against a real service: what people see of entries, their evidence and the log, and transfers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from typer.testing import CliRunner, Result

from mulligan.cli.app import app
from mulligan.common.channel import Endpoint
from mulligan.common.reflections import (
    MAX_TEXT_BYTES,
    Labels,
    Provenance,
    ReflectionKind,
    ReflectionQuery,
    ReflectionStatus,
    RetrievalStrategy,
    StoredReflection,
    Trial,
    UseOutcome,
)
from mulligan.memory.client import MemoryClient
from mulligan.testing.processes import ServiceProcess, ServiceProcesses

ORIGIN = Provenance("run", "experience", "lake", "train/00001", 3, 0.0, 1.0, True)
HOSTILE = "\x1b[2J into \x9bholes\x7f \u202e"
T = TypeVar("T")


def called(server: ServiceProcess, what: Callable[[MemoryClient], Awaitable[T]]) -> T:
    async def main() -> T:
        client = MemoryClient(Endpoint(server.address))
        try:
            return await what(client)
        finally:
            await client.close()

    return asyncio.run(main())


@pytest.fixture
def filled(embedding: ServiceProcess, scope: str) -> list[str]:
    """Ids of a rule, of a document that harms and is made from it, and of an episode that is made from the document."""

    async def fill(client: MemoryClient) -> list[str]:
        rule = await client.add("0", scope, "Walk around holes.", ORIGIN)
        labels = Labels(ReflectionKind.DOCUMENT, "lake", ("ice", "cold"), (rule,))
        document = await client.add("1", scope, HOSTILE, ORIGIN, labels)
        query = ReflectionQuery(scope, "lake", RetrievalStrategy.EXPLORE, 9)
        uses = (await client.query(query, Trial(tuple(f"use-{n}" for n in range(200)), 0.5))).uses
        await client.report([UseOutcome(use.use_id, float(use.left_out_id == document)) for use in uses])
        labels = Labels(ReflectionKind.EPISODE, source_ids=(document,))
        return [rule, document, await client.add("2", scope, "It fell.", ORIGIN, labels)]

    return called(embedding, fill)


@pytest.fixture
def command(embedding: ServiceProcess, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("MULLIGAN_CLI_MEMORY", embedding.address)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str, status: int = 0) -> Result:
        result = CliRunner().invoke(app, ["memory", *arguments])
        assert result.exit_code == status, result.output
        assert not {"\x1b", "\x9b", "\x7f", "\u202e"} & set(result.output)
        return result

    return run


def test_lists_show_evidence_and_filter(command: Callable[..., Result], filled: list[str], scope: str) -> None:
    whole = command("list", "--scope", scope).stdout
    assert all(f"{identity}  {scope}" in whole for identity in filled)
    assert "quarantined" in whole and "\\x1b[2J into \\x9bholes\\x7f \\u202e" in whole
    for flags, places in (
        (["--kind", "episode"], [2]),
        (["--status", "quarantined"], [1]),
        (["--key", "lake"], [1]),
        (["--tag", "ice", "--tag", "cold"], [1]),
        (["--tag", "ice", "--tag", "warm"], []),
        (["--limit", "1"], [0]),
    ):
        listed = command("list", "--scope", scope, *flags).stdout
        assert [identity in listed for identity in filled] == [place in places for place in range(3)], flags
    command("list", "--kind", "poem", status=2)


def test_why_says_what_came_of_the_uses(command: Callable[..., Result], filled: list[str]) -> None:
    told = command("why", filled[1], "--uses", "3").stdout
    assert "status      quarantined: proved to harm" in told
    assert "with it     mean reward 0.00 of " in told and "without it  mean reward 1.00 of " in told
    latest = [line.split()[0] for line in told.splitlines() if line.startswith(" use-")]
    assert latest == ["use-199", "use-198", "use-197"]
    assert filled[0] in told.partition("made from")[2] and f"made of it  {filled[2]}" in told
    assert "uplift      unknown: no use" in command("why", filled[2]).stdout
    assert "uplift      -" in command("show", filled[1]).stdout
    assert "no reflection 'none'" in command("why", "none", status=1).stderr


def test_no_label_writes_a_line_of_its_own(
    command: Callable[..., Result], embedding: ServiceProcess, scope: str
) -> None:
    forged = "k\nstatus      active\tuplift"
    labels = Labels(ReflectionKind.RULE, forged, (forged,))
    origin = replace(ORIGIN, task_id=forged, experience_id=forged)
    identity = called(embedding, lambda client: client.add("0", scope, "text", origin, labels))
    for name in ("show", "why"):
        lines = command(name, identity).stdout.splitlines()
        assert [line.split(":")[0] for line in lines if line.startswith("status")] == ["status      candidate"]


def test_entries_are_retired_and_released(command: Callable[..., Result], filled: list[str], scope: str) -> None:
    assert command("retire", filled[0]).stdout == "retired in revision 2\n"
    assert filled[0] in command("list", "--scope", scope, "--status", "retired").stdout
    assert "revision 3, without evidence" in command("release", filled[0]).stdout
    assert "candidate again" in command("release", filled[1]).stdout
    assert "quarantined" not in command("list", "--scope", scope).stdout


def test_erasing_asks_first_and_the_log_has_it(command: Callable[..., Result], filled: list[str], scope: str) -> None:
    refused = command("erase", filled[1], status=2).stderr
    assert filled[1] in refused and "--yes does it" in refused
    assert command("erase", filled[1], "--yes").stdout == "erased in version 5\n"
    assert command("forget", filled[0]).stdout == "forgotten from version 6 on\n"
    gone = command("list", "--scope", scope, "--deleted").stdout
    assert "(erased in 5)" in gone and "(forgotten in 6)" in gone and "holes" not in gone.replace("around holes", "")
    logged = command("log", "--scope", scope, "--limit", "2").stdout
    columns = [re.split(r" {2,}", line.strip()) for line in logged.splitlines()[1:]]
    assert [(version, action, who) for _, _, version, action, _, who in columns] == [
        ("5", "erase", "127.0.0.1"),
        ("6", "delete", "127.0.0.1"),
    ]
    assert "activate" in (all_of := command("log", "--scope", scope, "--all").stdout) or "quarantine" in all_of


def entries(server: ServiceProcess, scope: str) -> list[StoredReflection]:
    return called(server, lambda client: client.list(scope))


def test_what_is_exported_can_be_imported_again_and_again(
    command: Callable[..., Result], filled: list[str], scope: str, embedding: ServiceProcess, tmp_path: Path
) -> None:
    command("retire", filled[0])
    file = tmp_path / "entries.jsonl"
    assert "3 reflections written" in command("export", str(file), "--scope", scope).stderr
    assert command("export", "--scope", scope).stdout == file.read_text()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["reflection_id"] for line in lines] == filled and lines[1]["text"] == HOSTILE
    assert "0 added, 3 were there already" in command("import", str(file)).stdout
    half = tmp_path / "half.jsonl"
    half.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    other = f"{scope}-other"
    assert "2 added, 0" in command("import", str(half), "--scope", other).stdout
    done = command("import", str(file), "--scope", other)
    assert (
        "1 added, 2 were there already" in done.stdout
        and "0 active are candidates, 1 quarantined are retired" in done.stderr
    )
    found, originals = entries(embedding, other), entries(embedding, scope)
    assert [one.text for one in found] == [one.text for one in originals]
    assert [one.status for one in found] == [*[ReflectionStatus.RETIRED] * 2, ReflectionStatus.PROBATION]
    assert [one.source_ids for one in found] == [(), (found[0].reflection_id,), (found[1].reflection_id,)]
    assert [(one.kind, one.key, one.tags) for one in found] == [(one.kind, one.key, one.tags) for one in originals]
    assert len(entries(embedding, other)) == 3


def test_files_that_cannot_be_imported(
    command: Callable[..., Result], filled: list[str], scope: str, embedding: ServiceProcess, tmp_path: Path
) -> None:
    file = tmp_path / "entries.jsonl"
    command("export", str(file), "--scope", scope)
    first, second, third = file.read_text().splitlines()
    for lines, said in (
        ([first, "{"], "line 2: "),
        (["[1]"], "line 1: Expected `object`, got `array`"),
        ([second, first], f"line 1: its source '{filled[0]}' has to come before it"),
        ([first, first], f"line 2: '{filled[0]}' was in line 1"),
        ([first.replace('"rule"', '"poem"')], "line 1: Invalid enum value 'poem'"),
        ([first, third.replace("It fell.", "")], "line 2: text: "),
        ([first, third.replace("It fell.", "x" * (MAX_TEXT_BYTES + 1))], "line 2: text: "),
    ):
        file.write_text("\n".join(lines))
        assert said in command("import", str(file), "--scope", f"{scope}-other", status=2).stderr, lines
    assert not entries(embedding, f"{scope}-other"), "nothing was added"
    file.write_text(f"{second}\n\n{third}\n")
    lost = second.replace(f'"source_ids":["{filled[0]}"]', '"source_ids":["gone"]')
    file.write_text(f"{lost}\n\n{third}\n")
    assert "1 sources were left out" in command("import", str(file), "--scope", f"{scope}-third").stderr
    file.write_text(f"{third.replace('It fell.', 'It slid.')}\n".replace(filled[1], "gone"))
    refused = command("import", str(file), "--scope", f"{scope}-third", status=1)
    assert "1 were imported before with another content" in refused.stderr
    assert [one.text for one in entries(embedding, f"{scope}-third")] == [HOSTILE, "It fell."]


def test_a_memory_whose_callers_bring_embeddings_imports_nothing(
    command: Callable[..., Result],
    filled: list[str],
    scope: str,
    shared_services: ServiceProcesses,
    acme: dict[str, str],
    tmp_path: Path,
) -> None:
    file = tmp_path / "entries.jsonl"
    command("export", str(file), "--scope", scope)
    assert "embedding" not in file.read_text()
    settings: dict[str, Any] = {"embedder": "given", "given.size": 3}
    server = shared_services.start("memory", environment=acme, database="notes:desk", **settings)
    refused = command("import", str(file), "--memory", server.address, status=1).stderr
    assert "INVALID_FIELD: this memory takes no text without its embedding" in refused
    assert "nothing was imported" in refused and "3 numbers" in refused
    assert entries(server, scope) == []
