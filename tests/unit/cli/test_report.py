"""What a demo says at its end."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mulligan.cli.report import next_steps, recorded_rlvr
from mulligan.cli.train import read_settings
from mulligan.testing.recorded_runs import write_run
from mulligan.trainer.client import RunInfo
from mulligan.trainer.folder import RunState
from tests.support.paths import IMPORT_ROOTS


@pytest.mark.parametrize(
    ("recipe", "steps", "told"),
    [
        (
            "frozenlake-3x3",
            100,
            ("experiences demo/runs/demo-1 --step 10", "up --folder demo --model embedded ", "eval frozenlake-3x3 "),
        ),
        (
            "short-sentences-smollm2",
            1,
            (
                *("demo-1 --step 0", "up --folder demo --model smollm2-135m ", "eval short-sentences --run demo-1 "),
                # as the run measures, not as `eval` does by itself, with up to 1024 tokens an answer
                "--tasks 0 --samples 1 --temperature 0.8 --top-p 1.0 --top-k 0 --max-tokens 20",
            ),
        ),
    ],
)
def test_the_commands_to_go_on_with_fit_the_run(recipe: str, steps: int, told: tuple[str, ...]) -> None:
    settings = read_settings(Path(recipe), [f"steps={steps}"])
    run = RunInfo("demo-1", RunState.COMPLETED, "", settings, steps, datetime.now(UTC), 1.0, "demo/runs/demo-1")
    shown = "\n".join(next_steps(run))
    assert all(text in shown for text in told), shown


@pytest.mark.parametrize(
    ("recipe", "overrides", "recorded"),
    [
        ("frozenlake-3x3", [], "frozenlake-3x3-rlvr"),
        ("frozenlake-3x3", ["model.source=other"], None),
        ("frozenlake-3x3-rlvr", [], None),
        ("short-sentences-smollm2", [], None),
    ],
)
def test_a_run_is_compared_with_rlvr_of_the_same_model_and_task_alone(
    recipe: str, overrides: list[str], recorded: str | None
) -> None:
    found = recorded_rlvr(read_settings(Path(recipe), overrides))
    assert (found and found.recipe) == recorded


def test_what_a_command_writes_of_a_run_is_private_whatever_the_umask(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "run-1", steps=1)
    command = [sys.executable, "-m", "mulligan.cli", "report", "runs/run-1"]
    environment = {**os.environ, "PYTHONPATH": IMPORT_ROOTS}
    subprocess.run(command, cwd=tmp_path, env=environment, umask=0o022, check=True)
    assert (tmp_path / "run-1.html").stat().st_mode & 0o777 == 0o600
