"""The environment server in TypeScript violates nothing that the contract says, and ends when it is told to."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mulligan.cli.app import app
from tests.support.examples import Program, typescript

pytestmark = pytest.mark.timeout(300)  # builds and a run, on a machine that may be busy


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = tmp_path_factory.mktemp("server")
    return Program(["node", "dist/server/main.js"], typescript(folder), {"PROTO": str(folder / "contracts")})


def started(program: Program, *flags: str) -> tuple[subprocess.Popen[str], str]:
    """The process, and the address that it prints."""
    process = program.start("--address", "127.0.0.1:0", *flags)
    assert process.stdout is not None
    return process, process.stdout.readline().removeprefix("serving ").strip()


@pytest.fixture
def address(program: Program) -> Iterator[str]:
    """Short leases, so that the suite can wait for one to end; few places, so that it can fill them."""
    process, address = started(program, "--lease-seconds", "5", "--max-episodes", "8")
    yield address
    process.kill()
    process.wait()


def test_it_conforms(address: str) -> None:
    flags = ["--target", address, "--action", "50", "--action", "7", "--json"]
    result = CliRunner().invoke(app, ["conformance", "env", *flags])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert "guess-number" in json.dumps(report)


def test_conformance_notices_a_violation_in_it(program: Program, tmp_path: Path) -> None:
    """The suite looks at this server: with one comparison changed, a step is played again when it is repeated."""
    episodes = program.folder / "dist" / "server" / "episodes.js"
    text = episodes.read_text()
    stored = "if (stepIndex < answers.length)"
    assert stored in text
    episodes.write_text(text.replace(stored, "if (stepIndex < answers.length - 1)"))
    try:
        process, address = started(program)
        try:
            flags = ["--target", address, "--only", "repeated step"]
            result = CliRunner().invoke(app, ["conformance", "env", *flags])
        finally:
            process.kill()
            process.wait()
    finally:
        episodes.write_text(text)
    assert result.exit_code == 1, result.output
    assert "StepEpisode" in result.output


def test_it_ends_at_sigterm(program: Program) -> None:
    process, _ = started(program)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0


def test_a_taken_address_stops_the_start(program: Program, address: str) -> None:
    assert address in program.refusal("--address", address)
