"""The wheel, installed by itself into an environment of its own: all of the README works in an empty folder, beside
folders of a user that have the names of ours."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from mulligan.cli.local import free_ports
from tests.support.paths import ROOT

SOURCES = ("pyproject.toml", "README.md", "services", "models", "recipes", "src")
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


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel, and an empty folder in which a user works."""

    python: Path
    folder: Path

    def run(self, *arguments: str | Path, variables: Mapping[str, str] | None = None) -> str:
        """What `python ARGUMENT…` prints there."""
        environment = surroundings() | dict(variables or {})
        done = subprocess.run(
            [self.python, *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def mulligan(self, *arguments: str | Path, variables: Mapping[str, str] | None = None) -> str:
        return self.run(self.python.with_name("mulligan"), *arguments, variables=variables)


def surroundings() -> dict[str, str]:
    """Environment variables without a way to this repository."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source], check=True, cwd=folder
    )
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(source)
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True, cwd=folder)
    # What it depends on is that of this environment, whose own links to the source are not followed from there.
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    here = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    (packages / "dependencies.pth").write_text("\n".join(here))
    empty = folder / "empty"
    empty.mkdir()
    return Installed(python, empty)


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


def test_the_demo_runs_in_an_empty_folder(installed: Installed) -> None:
    settings = ("steps=1", "rollout.tasks_per_step=2", "evaluation.tasks=4", "evaluation.samples=1")
    told = installed.mulligan("demo", *(word for setting in settings for word in ("--set", setting)))
    assert "success on the test boards" in told
    assert (installed.folder / "runs" / "demo" / "runs" / "demo-1" / "chart.png").exists()
    assert "first attempt" in installed.mulligan("experiences", "runs/demo/runs/demo-1", "--step", "0")


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


@contextmanager
def up(installed: Installed) -> Iterator[dict[str, str]]:
    """`mulligan up`, ready; the variables that tell other commands where."""
    base = free_port_base()
    command = [str(installed.python.with_name("mulligan")), "up", "--config", "mulligan.toml", "--port-base", str(base)]
    with subprocess.Popen(
        command, cwd=installed.folder, env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            told = ""
            while "commands find them by: export " not in told:
                line = process.stdout.readline()
                assert line, told
                told += line
            yield dict(one.split("=", 1) for one in told.rpartition("export ")[2].split())
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=100)
    assert process.returncode == 0


def free_port_base() -> int:
    """Four free ports in a row."""
    while True:
        base = free_ports()["env"]
        with ExitStack() as held:
            try:
                for port in range(base, base + 4):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
        return base


def test_what_the_readme_shows_step_by_step_works(installed: Installed) -> None:
    (installed.folder / "greetings.py").write_text(ENVIRONMENT.replace("    reveal_type(client)\n", ""))
    (installed.folder / "mulligan.toml").write_text(SETTINGS)
    small = ("rollout.tasks_per_step=2", "rollout.rollouts_per_task=2", "evaluation.tasks=2", "steps=1")
    settings = [word for setting in small for word in ("--set", setting)]
    with up(installed) as variables:
        run = partial(installed.mulligan, variables=variables)
        assert "completed" in run("train", "frozenlake-3x3", "--run-id", "short", *settings)
        assert "short" in run("runs")
        assert "attempts" in run("eval", "frozenlake-3x3", "--run", "short", "--tasks", "2", "--samples", "1")
        assert "attempts" in run("eval", "greetings", "--samples", "1", "--max-tokens", "4")
        assert "first attempt" in run("experiences", "runs/local/runs/short", "--step", "0")
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
