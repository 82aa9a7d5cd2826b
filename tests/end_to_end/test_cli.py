"""The command line as a person uses it: in a terminal, on processes of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mulligan.cli.app import app
from mulligan.cli.recipes import RECIPES, recipe_file
from mulligan.common.access import AccessRole
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.journal import journaled_steps, read_experiences
from tests.support.llama_model import write_llama_model
from tests.support.paths import IMPORT_ROOTS, ROOT
from tests.support.tokens import token_of, write_tokens

TINY = [
    *("--set", "steps=3", "--set", "rollout.tasks_per_step=4", "--set", "rollout.rollouts_per_task=2"),
    *("--set", "evaluation.tasks=5", "--set", "evaluation.samples=1", "--set", "evaluation.every=2"),
    *("--set", "checkpoint_every=1"),
]


def mulligan(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mulligan.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": IMPORT_ROOTS, "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in found.split()]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_demo_is_interrupted_and_goes_on_to_its_end(tmp_path: Path) -> None:
    first = mulligan("demo", "--folder", str(tmp_path), *TINY)
    journal = tmp_path / "runs" / "demo-1" / "journal"
    deadline = time.monotonic() + 120
    while not list(journal.glob("*")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    processes = children(first.pid)
    assert len(processes) == 4
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=90)
    assert first.returncode == 130, output
    [hint] = [line.partition("goes on where it was: ")[2] for line in output.splitlines() if "goes on where" in line]
    program, *again = shlex.split(hint)
    assert program.endswith("mulligan") and again[:3] == ["demo", "--folder", str(tmp_path)]
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes), "nothing is left running"

    second = mulligan(*again)
    output, _ = second.communicate(timeout=200)
    assert second.returncode == 0, output
    run = tmp_path / "runs" / "demo-1"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3 and 0 <= summary["test_success_before"] <= 1
    assert (run / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert "success on the test tasks" in output and "go on" in output
    chains = [chain for step in journaled_steps(journal) for chain in read_experiences(journal / f"{step:06}.msgpack")]
    assert len({chain.experience_id for chain in chains}) == len(chains) == 3 * 4 * 2
    assert summary["rollouts"] == sum(len(list(chain.samples)) for chain in chains)
    told = CliRunner().invoke(app, ["experiences", str(run), "--step", "1", "--limit", "2"])
    assert told.exit_code == 0 and told.stdout.count("─── first:") == 2


def test_every_command_explains_itself_with_an_example() -> None:
    runner = CliRunner()
    commands = ["demo", "up", "train", "watch", "runs", "stop", "resume", "experiences", "eval"]
    entries = ("list", "show", "why", "log", "forget", "erase", "retire", "release", "export", "import")
    memory = [["memory", name] for name in entries]
    policy = [["policy", name] for name in ("list", "show", "load", "unload", "versions", "rollback")]
    models = [["models", name] for name in ("list", "fetch")]
    for command in [[name] for name in commands] + memory + models + policy:
        shown = runner.invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0 and f"mulligan {' '.join(command)}" in shown.stdout.replace("\n", " "), command


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("steps=0", "steps: Input should be greater than or equal to 1"),
        ("rollout.temprature=1", "rollout.temprature: no such setting; did you mean 'temperature'?"),
        (
            "algorithm.second_attempt=often",
            "algorithm.second_attempt: expected reflection, none, raw_retry, try_again",
        ),
        ("algorithm.name=elr", "algorithm.name: there is no algorithm 'elr'; did you mean 'erl'?"),
        ("steps", "--set steps: expected NAME=VALUE"),
    ],
)
def test_a_bad_setting_is_named(override: str, complaint: str) -> None:
    shown = CliRunner().invoke(app, ["train", str(ROOT / "recipes" / "frozenlake-3x3.toml"), "--set", override])
    assert shown.exit_code == 2 and complaint in shown.output


def test_a_folder_of_its_name_does_not_hide_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "frozenlake-3x3").mkdir()
    monkeypatch.chdir(tmp_path)
    assert recipe_file(Path("frozenlake-3x3")) == RECIPES / "frozenlake-3x3.toml"


def test_a_service_that_is_away_is_one_line() -> None:
    shown = mulligan("runs", "--trainer", "127.0.0.1:1")
    output, _ = shown.communicate(timeout=60)
    assert shown.returncode == 1 and "error: 127.0.0.1:1 was unreachable" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("address", "status", "complaint"),
    [
        ("nowhere.invalid:50054", 1, "nowhere.invalid:50054 was unreachable for 0 s: the host is not known: "),
        ("foo:bar", 2, "'foo:bar': expected a port from 1 to 65535, not 'bar'"),
        ("localhost", 2, "'localhost': expected host:port"),
        ("localhost:50054-50055", 2, "'localhost:50054-50055' names several servers: expected the host:port of one"),
    ],
)
def test_an_address_that_cannot_be_called_is_said_without_trying_again(
    address: str, status: int, complaint: str
) -> None:
    for command in (["runs", "--trainer", address], ["env", "play", "frozenlake", "--target", address]):
        shown = CliRunner().invoke(app, command)
        assert shown.exit_code == status and f"error: {complaint}" in shown.output
        assert "waiting for a service" not in shown.output


def test_a_token_is_not_sent_to_another_machine_in_the_open() -> None:
    environment = {"MULLIGAN_CLI_TOKEN": token_of(AccessRole.READER)}
    for command in (["runs", "--trainer", "10.0.0.7:50054"], ["conformance", "env", "--target", "10.0.0.7:50051"]):
        shown = CliRunner().invoke(app, command, env=environment)
        assert shown.exit_code == 2 and "would cross the network without TLS" in shown.output
        assert token_of(AccessRole.READER) not in shown.output


def test_policies_are_looked_after(services: ServiceProcesses, tmp_path: Path) -> None:
    address = services.start("policy", threads=1, models_folder=tmp_path, tokens_folder=write_tokens(tmp_path)).address

    def call(*arguments: str, token: str = token_of(AccessRole.ADMIN)) -> Result:
        environment = {"MULLIGAN_CLI_POLICY": address, "MULLIGAN_CLI_TOKEN": token, "COLUMNS": "200"}
        return CliRunner().invoke(app, ["policy", *arguments], env=environment)

    def said(*arguments: str) -> str:
        result = call(*arguments)
        assert result.exit_code == 0, result.output + str(result.exception)
        return result.output

    def refused(*arguments: str, token: str = token_of(AccessRole.ADMIN)) -> str:
        result = call(*arguments, token=token)
        assert result.exit_code in (1, 2) and "Traceback" not in result.output
        return str(result.output)

    llama = write_llama_model(tmp_path / "llama")
    assert "policy other serves" in said("load", "other", "--model", str(llama), "--set", "context_length=512")
    shown = said("show", "other")
    assert "llama (transformers)" in shown and "512 tokens" in shown and "token_ids" in shown
    listed = said("list")
    assert "embedded" in listed and "llama" in listed and "1 of 1 serve" in listed
    assert "as version 1 " in said("load", "other", "--model", "embedded")
    versions = said("versions", "other").splitlines()
    assert versions[1].split()[:2] == ["1", "serving"] and "embedded" in versions[1] and "llama" in versions[2]
    assert "VERSION_NOT_KEPT" in refused("rollback", "other", "0")
    said("unload", "other")
    assert "UNKNOWN_POLICY" in refused("show", "other")
    assert "DEFAULT_POLICY" in refused("unload", "actor")
    assert "BAD_MODEL" in refused("load", "actor", "--model", str(ROOT / "tests"))
    (tmp_path / "empty").mkdir()
    assert "UNSUPPORTED_MODEL" in refused("load", "actor", "--model", str(tmp_path / "empty"))
    assert "BAD_CREDENTIAL" in refused("load", "actor", "--model", "embedded", token="guess")
    assert "needs the role admin" in refused("unload", "other", token=token_of(AccessRole.TRAINER))
    assert "expected NAME=VALUE" in refused("load", "actor", "--model", "embedded", "--set", "context_length")
    assert "embedded" in said("show"), "what was refused changed nothing"
