"""The README's three uses: short, and what they say to paste works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mulligan.cli.connection import endpoint
from mulligan.policy.client import PolicyClient
from mulligan.testing.loop import Loop
from tests.support.examples import RUN_SECONDS, modules
from tests.support.paths import IMPORT_ROOTS, ROOT

pytestmark = pytest.mark.timeout(300)  # builds and a run, on a machine that may be busy

DOCKER, LANGUAGE, MODEL = USES = (
    "Run the services with Docker",
    "Call them from another language",
    "Swap the model",
)


def section(title: str) -> str:
    """From the heading to the next one, without blank lines around it."""
    found = re.search(rf"^### {title}\n.*?(?=^##)", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[0].strip()


def commands(title: str) -> str:
    (block,) = re.findall(r"^```sh\n(.*?)^```$", section(title), re.MULTILINE | re.DOTALL)
    return str(block)


def paste(text: str, folder: Path, addresses: dict[str, str], **variables: str) -> str:
    """What bash prints; fails at the first command that does."""
    result = subprocess.run(
        ["bash", "-euc", text],
        cwd=folder,
        env={**os.environ, **addresses, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("title", USES)
def test_each_use_has_at_most_ten_lines(title: str) -> None:
    assert len(section(title).splitlines()) <= 10


def test_docker_commands_are_those_that_the_docker_tests_run() -> None:
    """tests/docker and `make proof` run them on a real engine; here only that they name files which are there."""
    compose = re.search(r"COMPOSE_FILE=(\S+)", commands(DOCKER))
    assert compose is not None and (ROOT / compose[1]).is_file()
    documented = (ROOT / "docs" / "docker.md").read_text()
    for line in commands(DOCKER).splitlines():
        assert line.partition(" --set")[0] in documented, line


def test_another_language_calls_the_services(loop: Loop, addresses: dict[str, str], tmp_path: Path) -> None:
    """In a folder with the example and the contracts where the repository has them."""
    modules()  # skips where there is no npm
    ignored = shutil.ignore_patterns("node_modules", "gen", "dist")
    shutil.copytree(ROOT / "examples" / "typescript", tmp_path / "examples" / "typescript", ignore=ignored)
    for package in ("mulligan", "buf"):
        shutil.copytree(ROOT / "proto" / package, tmp_path / "proto" / package)
    output = paste(commands(LANGUAGE), tmp_path, addresses, npm_config_prefer_offline="true")
    assert "\nreward " in output
    assert "tokens, STOP_REASON_" in output
    assert "step 1: " in output and "RUN_STATE_COMPLETED" in output


async def test_a_model_is_swapped(loop: Loop, addresses: dict[str, str]) -> None:
    text = commands(MODEL).replace(".venv/bin/mulligan", f"{sys.executable} -m mulligan.cli")
    output = paste(text, ROOT, addresses, PYTHONPATH=IMPORT_ROOTS)
    assert "policy actor serves embedded already, as version " in output
    assert "attempts     100 (0 excluded)" in output
    assert "completed" in output
    policy = PolicyClient(endpoint(loop.policy.address))
    try:
        assert (await policy.info("actor")).model == "embedded"
    finally:
        await policy.close()
