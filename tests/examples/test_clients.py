"""The clients in TypeScript and Go, built from nothing but themselves and the contracts, against live services."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest

from mulligan.cli.connection import endpoint
from mulligan.common.access import AccessRole
from mulligan.common.certificates import Certificates
from mulligan.common.experience import Sample
from mulligan.common.inference import Message, Role, SamplingParams, StopReason
from mulligan.common.types import Outcome, Split
from mulligan.env.client import EnvClient
from mulligan.policy.client import PolicyClient
from mulligan.testing.loop import Loop
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.client import RunClient
from mulligan.trainer.folder import RunState
from mulligan.trainer.harness import Harness
from tests.support.examples import Program, go
from tests.support.playing import play_episode
from tests.support.tokens import token_of, write_tokens

pytestmark = pytest.mark.timeout(300)  # builds and a run, on a machine that may be busy

LAKE = "frozenlake-3x3"
GREEDY = ("--temperature", "0", "--max-tokens", "4")


async def played_by_the_trainer(loop: Loop) -> Sample:
    """The first test task, greedily: what any client has to get."""
    env = EnvClient(endpoint(loop.env.address))
    policy = PolicyClient(endpoint(loop.policy.address))
    try:
        info = await env.describe(LAKE)
        (task,) = await env.list_tasks(LAKE, Split.TEST, 1)
        harness = Harness(env, policy, info, await policy.info(), uuid4().hex, max_restarts=0)
        sampling = SamplingParams(temperature=0, max_tokens=4)
        return await play_episode(harness, "reference", task.task_id, info.prompts.solver, sampling)
    finally:
        await env.close()
        await policy.close()


async def test_it_plays_an_episode_as_the_trainer_would(client: Program, loop: Loop) -> None:
    """Prompts, sessions and continuations are put together right: the greedy policy answers the same, turn by turn."""
    expected = await played_by_the_trainer(loop)
    assert expected.turns, expected.error
    output = client.output("play", *GREEDY)
    assert [line[2:] for line in output.splitlines() if line.startswith("> ")] == [t.action for t in expected.turns]
    ending = {Outcome.COMPLETED: "OUTCOME_COMPLETED", Outcome.TRUNCATED: "OUTCOME_TRUNCATED"}[expected.outcome]
    assert f"\n{ending}: {expected.feedback}\nreward {expected.reward:g}\n" in output


def test_it_says_the_reason_of_an_error(client: Program) -> None:
    assert client.refusal("play", "--task", "nowhere").startswith("error: UNKNOWN_TASK: ")
    assert LAKE in client.refusal("play", "--environment", "nowhere")
    assert client.refusal("stream", "--max-tokens", "0").startswith("error: INVALID_FIELD: ")


def test_it_says_that_a_service_is_down(client: Program) -> None:
    assert re.match("error: unavailable: ", client.refusal("stream", "--policy", "127.0.0.1:1"), re.IGNORECASE)


async def test_it_streams_tokens(client: Program, loop: Loop) -> None:
    policy = PolicyClient(endpoint(loop.policy.address))
    try:
        prompt = (Message(Role.USER, "Hello"),)
        expected = await policy.generate(prompt, SamplingParams(temperature=0, max_tokens=8))
    finally:
        await policy.close()
    output = client.output("stream", "--prompt", "Hello", "--temperature", "0", "--max-tokens", "8")
    reasons = {StopReason.END_OF_TURN: "STOP_REASON_END_OF_TURN", StopReason.MAX_TOKENS: "STOP_REASON_MAX_TOKENS"}
    last = f"{len(expected.token_ids)} tokens, {reasons[expected.stop_reason]}"
    assert output == f"{expected.text}\n{last}\n"


async def test_it_starts_a_run_and_watches_it_through_a_restart(client: Program, loop: Loop) -> None:
    run_id = f"example-{Path(client.command[0]).name}"
    watching = client.start("train", "--run-id", run_id, "--steps", "3")
    assert watching.stdout is not None
    lines: list[str] = []
    for line in watching.stdout:
        lines.append(line.rstrip())
        if line.startswith("step 0:"):
            loop.trainer.restart()
    assert watching.wait() == 0, lines
    assert lines[:2] == [f"run {run_id}", "RUN_STATE_RUNNING"] and lines[-1] == "RUN_STATE_COMPLETED"
    assert [line.partition(":")[0] for line in lines if line.startswith("step ")] == ["step 0", "step 1", "step 2"]
    assert [line[:18] for line in lines if line.startswith("eval")] == ["evaluation after 0", "evaluation after 3"]
    trainer = RunClient(endpoint(loop.trainer.address))
    try:
        assert (await trainer.get(run_id)).state is RunState.COMPLETED
    finally:
        await trainer.close()
    assert client.refusal("train", "--run-id", run_id, "--steps", "4").startswith("error: RUN_CONFLICT: ")


def test_a_variable_wins_over_the_token_that_it_finds(client: Program) -> None:
    for token in (token_of(AccessRole.ADMIN), ""):
        assert "error: BAD_CREDENTIAL: " in client.refusal("stream", MULLIGAN_CLI_TOKEN=token)


def test_it_sends_no_token_that_was_left_behind(client: Program, loop: Loop, tmp_path: Path) -> None:
    """By a `mulligan up` that was killed: another user's program may listen there by now."""
    found = tmp_path / "mulligan" / "services" / os.uname().nodename / loop.policy.address
    found.parent.mkdir(parents=True)
    ended = subprocess.Popen(["true"])
    ended.wait()
    for process, goes in ((ended.pid, False), (os.getpid(), True)):
        found.write_text(f"{process}\n{loop.folder / 'tokens'}\n")
        result = client.run("stream", "--max-tokens", "4", XDG_STATE_HOME=str(tmp_path))
        assert (result.returncode == 0, "BAD_CREDENTIAL" in result.stderr) == (goes, not goes), result.stderr


def test_it_sends_the_token_and_speaks_tls(client: Program, services: ServiceProcesses, tmp_path: Path) -> None:
    Certificates(tmp_path / "certs").update()
    tls = tmp_path / "certs" / "services" / "env"
    env = services.start(
        "env", tokens_folder=write_tokens(tmp_path), tls_key=tls / "tls.key", tls_certificate=tls / "tls.crt"
    )
    play = ("play", "--env", env.address, "--ca", str(tls / "ca.crt"), "--environment", "nowhere")
    assert "error: BAD_CREDENTIAL: " in client.refusal(*play)
    assert "error: no environment" in client.refusal(*play, MULLIGAN_CLI_TOKEN=token_of(AccessRole.READER))


def test_it_tells_how_it_is_used(client: Program) -> None:
    result = client.run()
    assert result.returncode == 2
    assert "usage: " in result.stderr and "stream" in result.stderr


@pytest.mark.parametrize(
    ("command", "named"), [("dance", "stream"), ("play --steps", "steps"), ("play --what 1", "what")]
)
def test_bad_flags_are_named_without_a_trace(client: Program, command: str, named: str) -> None:
    result = client.run(*command.split())
    assert result.returncode in (1, 2)
    assert named in result.stderr and "at file:" not in result.stderr


def test_the_go_code_is_formatted_and_vetted(tmp_path: Path) -> None:
    folder = go(tmp_path)
    assert Program(["gofmt", "-l", *(path.name for path in folder.glob("*.go"))], folder).output() == ""
    modules_off = {"GO111MODULE": "off", "GOFLAGS": "", "GOPATH": f"{folder / 'build'}:/usr/share/gocode"}
    Program(["go", "vet", "mulligan-client"], folder, modules_off).output()


def test_it_sends_no_token_to_another_machine_without_tls(client: Program, tmp_path: Path) -> None:
    for address in ("192.0.2.1:50052", "[2001:db8::1]:50052", "127.0.0.1.example.org:50052"):
        told = client.refusal("stream", "--policy", address, MULLIGAN_CLI_TOKEN="a-token-of-mine")
        assert f"the token for {address} would cross the network without TLS: expected --ca FILE" in told
        assert "a-token-of-mine" not in told
    for allowed in (
        ("--policy", "127.0.0.1:1"),
        ("--policy", "[::1]:1"),
        ("--policy", "localhost:1"),
        ("--policy", "mulligan.invalid:1", "--insecure"),
    ):
        assert "without TLS" not in client.refusal("stream", *allowed, MULLIGAN_CLI_TOKEN="a-token-of-mine")
    assert "without TLS" not in client.refusal("stream", "--policy", "mulligan.invalid:1", MULLIGAN_CLI_TOKEN="")
