"""The wheel, installed by itself into an environment of its own: all of the README works in an empty folder, beside
folders of a user that have the names of ours."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest

from mulligan.cli.local_tokens import LocalTokens, find_tokens
from mulligan.common.access import ACCESS, AccessRole
from mulligan.common.config import SERVICES
from mulligan.common.tokens import bearer
from tests.support.console import started
from tests.support.wheel import Installed, install, surroundings, up

THEIRS = ("services", "models", "buf", "recipes", "tests")  # packages of a user
ENVIRONMENT = """
from collections.abc import Mapping, Sequence

from mulligan import Endpoint
from mulligan.env import Environment, EnvironmentInfo, Split, StepResult, TaskInfo, connect, generic_prompts


class Greeting:
    observation = "Say hello."

    def step(self, action: str) -> StepResult:
        return StepResult("", action[:20], reward=float("hello" in action), done=True)


class Greetings:
    info = EnvironmentInfo(
        "greetings", "Say hello", generic_prompts("Say hello.", "Any text."), 1, 1.0, True, dict.fromkeys(Split, 1)
    )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        return [TaskInfo("one", split, 1.0)][offset : offset + limit]

    def start(self, task_id: str) -> Greeting:
        return Greeting()


def create(name: str, settings: Mapping[str, object]) -> Environment:
    return Greetings()


async def reward(address: str) -> float:
    client = connect(Endpoint(address))
    reveal_type(client)
    return 0.0
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def beside_others(installed: Installed) -> Installed:
    """The user has packages of these names."""
    for name in THEIRS:
        (installed.folder / name).mkdir(exist_ok=True)
        (installed.folder / name / "__init__.py").write_text(f"whose = 'the user, {name}'\n")
    return installed


def test_it_installs_one_package(beside_others: Installed) -> None:
    code = "import mulligan, services, models, buf; print(mulligan.__file__, services.whose, models.whose, buf.whose)"
    place, _, whose = beside_others.run("-c", code).strip().partition(" ")
    assert Path(place).is_relative_to(beside_others.python.parents[1])
    assert whose == "the user, services the user, models the user, buf"
    code = "from importlib.metadata import files; print(*{f.parts[0] for f in files('mulligan') if f.suffix == '.py'})"
    assert beside_others.run("-c", code).split() == ["mulligan"]


def test_the_types_reach_a_users_checker(beside_others: Installed) -> None:
    (beside_others.folder / "greetings.py").write_text(ENVIRONMENT)
    told = beside_others.run("-m", "mypy", "--strict", "--cache-dir", os.devnull, "greetings.py")
    assert 'Revealed type is "mulligan.env.' in told


@pytest.mark.long
def test_the_demo_runs_in_an_empty_folder(installed: Installed) -> None:
    settings = ("steps=1", "rollout.tasks_per_step=2", "evaluation.tasks=4", "evaluation.samples=1")
    told = installed.mulligan("demo", *(word for setting in settings for word in ("--set", setting)))
    assert "success on the test tasks" in told
    assert (installed.folder / "runs" / "demo" / "runs" / "demo-1" / "chart.png").exists()
    assert "─── first: " in installed.mulligan("experiences", "runs/demo/runs/demo-1", "--step", "0")


def test_the_recording_is_shown_from_an_empty_folder(installed: Installed) -> None:
    command = [str(installed.python.with_name("mulligan")), "ui", "--demo", "--port", "0"]
    with started(command, surroundings(), installed.folder) as address, urlopen(address, timeout=60) as answer:
        text = answer.read().decode()
    assert "This is a recording" in text and 'href="/runs/erl"' in text


SETTINGS = """
[env.environments.greetings]
kind = "greetings"

[env.environments.frozenlake-3x3]
kind = "frozenlake"
size_min = 3
size_max = 3
prompts = "compact"

[memory]
log_level = "warning"
"""


def statuses(service: str, address: str, token: str = "") -> dict[str, grpc.StatusCode]:
    """What comes of all calls that need a role, with an empty request."""
    found: dict[str, grpc.StatusCode] = {}
    with grpc.insecure_channel(address) as channel:
        for name, calls in ACCESS.items():
            for call in (call for call, role in calls.items() if role and name.startswith(f"mulligan.{service}.")):
                method = channel.stream_stream(f"/{name}/{call}", lambda request: request, lambda answer: answer)
                answers = method(iter([b""]), timeout=60, metadata=bearer(token) if token else ())
                found[call] = answers.code()
                answers.cancel()
    assert found
    return found


def assert_closed_to_strangers(folder: Path, addresses: dict[str, str]) -> None:
    """Other users of the machine, who cannot read the tokens, and holders of the other services' tokens."""
    tokens = LocalTokens(folder)
    assert {path.stat().st_mode & 0o777 for path in (tokens.of("env"), tokens.of("trainer"))} == {0o700}
    for service, address in addresses.items():
        assert find_tokens(address) == tokens.of(service)
        others = tokens.of("trainer" if service == "env" else "env") / AccessRole.ADMIN
        for token in ("", others.read_text().strip()):
            assert set(statuses(service, address, token).values()) == {grpc.StatusCode.UNAUTHENTICATED}


@pytest.mark.long
def test_what_the_readme_shows_step_by_step_works(installed: Installed) -> None:
    (installed.folder / "greetings.py").write_text(ENVIRONMENT.replace("    reveal_type(client)\n", ""))
    (installed.folder / "mulligan.toml").write_text(SETTINGS)
    small = ("rollout.tasks_per_step=2", "rollout.rollouts_per_task=2", "evaluation.tasks=2", "steps=1")
    settings = [word for setting in small for word in ("--set", setting)]
    with up(installed) as variables:
        addresses = {service: variables[f"MULLIGAN_CLI_{service.upper()}"] for service in SERVICES}
        assert_closed_to_strangers(installed.folder / "runs" / "local", addresses)
        run = partial(installed.mulligan, variables=variables)
        assert "completed" in run("train", "frozenlake-3x3", "--run-id", "short", *settings)
        assert "short" in run("runs")
        assert "attempts" in run("eval", "frozenlake-3x3", "--run", "short", "--tasks", "2", "--samples", "1")
        assert "attempts" in run("eval", "greetings", "--samples", "1", "--max-tokens", "4")
        assert "─── first: " in run("experiences", "runs/local/runs/short", "--step", "0")
        assert "actor" in run("policy", "list")
        assert "serves embedded already" in run("policy", "load", "actor", "--model", "embedded")
        assert "version" in run("policy", "versions", "actor")
        target = ("--target", variables["MULLIGAN_CLI_ENV"], "--environment", "frozenlake-3x3")
        run("memory", "list")
        run("learners")
        run("env", "new", "word_chain")
        assert run("env", "check", "word_chain")
        installed.run("-m", "pytest", "-q", "test_word_chain.py")
        assert "0 violated" in run("conformance", "env", *target)
        assert "left after 0 steps" in run("env", "play", "greetings", *target[:2])
    assert [find_tokens(address) for address in addresses.values()] == [None] * 4, "the services have ended"
