"""The calls of examples/grpcurl.md, as they stand there, by server reflection."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from mulligan.testing.loop import Loop
from tests.support.examples import RUN_SECONDS
from tests.support.made import buf
from tests.support.paths import ROOT

pytestmark = pytest.mark.timeout(300)  # builds and a run, on a machine that may be busy

PAGE = ROOT / "examples" / "grpcurl.md"
BLOCK = re.compile(r"^```sh ?(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


BLOCKS = [text for name, text in BLOCK.findall(PAGE.read_text()) if name in ("", "buf")]
FUNCTIONS, CALLS = BLOCKS[:2], BLOCKS[2:]


def run(loop: Loop, *commands: str) -> subprocess.CompletedProcess[str]:
    """With the page's functions, and `buf curl` in grpcurl's place, whose flags differ but whose answers do not."""
    script = "set -eu\n" + "\n".join([*FUNCTIONS, *commands])
    for port, service in {50051: loop.env, 50052: loop.policy, 50054: loop.trainer}.items():
        script = script.replace(f"127.0.0.1:{port}", service.address)
    environment = {**os.environ, "PATH": f"{buf().parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)


@pytest.fixture(scope="module")
def output(loop: Loop) -> str:
    """What all the blocks print."""
    assert len(CALLS) == 4
    result = run(loop, *CALLS)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "expected",
    [
        "mulligan.env.v1.EnvService/StepEpisodes\n",
        '"name": "frozenlake-3x3"',
        '"taskId": "test/00001"',
        '"FEATURE_TOKEN_IDS"',
        '"status": "SERVING"',
        '"action": "Up',
        '"stopReason": "STOP_REASON_',
        '"stepCompleted"',
        '"state": "RUN_STATE_COMPLETED"',
    ],
)
def test_the_answers_are_there(output: str, expected: str) -> None:
    assert expected in output


def test_a_repeated_step_is_answered_alike(output: str) -> None:
    steps = re.findall(r'\{\n  "observation": "[^"]*",\n  "action": .*?\n\}', output, re.DOTALL)
    assert len(steps) == 2 and steps[0] == steps[1]


def test_an_error_shows_its_details(loop: Loop) -> None:
    """What the page says of it: `not_found`, with an ErrorInfo."""
    request = '{"episode_id": "none", "environment": "frozenlake-3x3", "task_id": "nowhere"}'
    result = run(loop, f"call 127.0.0.1:50051 mulligan.env.v1.EnvService/StartEpisode '{request}'")
    assert result.returncode != 0
    assert '"not_found"' in result.stderr and "google.rpc.ErrorInfo" in result.stderr


def test_a_variable_wins_over_the_token_that_is_found(loop: Loop) -> None:
    result = run(loop, "MULLIGAN_CLI_TOKEN=guess call 127.0.0.1:50051 mulligan.env.v1.EnvService/ListEnvironments {}")
    assert result.returncode != 0
    assert "failed to find service" in result.stderr, "reflection is refused, which the page tells of"


@pytest.mark.parametrize(
    ("address", "variables", "goes"),
    [
        ("127.0.0.1:50051", {}, True),
        ("localhost:50051", {}, True),
        ("[::1]:50051", {}, True),
        ("192.0.2.1:50051", {}, False),
        ("127.0.0.1.example.org:50051", {}, False),
        ("192.0.2.1:50051", {"MULLIGAN_CLI_INSECURE": "true"}, True),
    ],
)
def test_a_token_goes_to_no_other_machine_unencrypted(address: str, variables: dict[str, str], goes: bool) -> None:
    # In place of the program that would send it: what it would be given.
    script = "\n".join([FUNCTIONS[1], f'sent=$(token "{address}") && echo "sent $sent"'])
    environment = {**os.environ, "MULLIGAN_CLI_TOKEN": "mine", **variables}
    result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode == 0, result.stdout) == (goes, "sent mine\n" if goes else "")
    assert ("would cross the network without TLS" in result.stderr) is not goes and "mine" not in result.stderr
