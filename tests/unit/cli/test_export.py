"""`mulligan export`: which checkpoint it finds, and what it refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from mulligan.cli.app import app
from mulligan.trainer.folder import Checkpoint, RunFolder
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.settings import LearnerSpec
from mulligan.trainer.settings import RunSettings
from tests.support.learning import PLAIN, sampled, server_settings
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RUNS_FOLDER", "CHECKPOINT_FOLDER"):
        monkeypatch.delenv(f"MULLIGAN_TRAINER_{name}", raising=False)


def export(*words: str) -> Result:
    return CliRunner().invoke(app, ["export", *words])


def make_run(folder: Path, run_id: str = "run-1", *, last: int | None = 4, **settings: Any) -> RunFolder:
    """A run's folder as a trainer writes it."""
    run = RunFolder(folder / run_id)
    model = {"source": "embedded"} | settings.pop("model", {})
    run.create(run_id, RunSettings.model_validate({"environment": "frozenlake-3x3", "model": model, **settings}))
    if last is not None:
        run.write_checkpoint(Checkpoint(f"{run_id}-{last:06}", last, 0))
    return run


def train(folder: Path, run: RunFolder, *steps: int) -> Path:
    """Checkpoints of the run's learner after these steps, below `folder`; each step changes the weights."""
    settings = run.settings()
    learner = Learner(run.record().run_id, LearnerSpec(settings.model, settings.optimizer), server_settings(folder))
    for step in steps:
        learner.forward_backward([sampled()], PLAIN)
        learner.optim_step()
        learner.save_checkpoint(f"{learner.learner_id}-{step:06}")
    return folder / "checkpoints" / learner.learner_id


def test_the_last_checkpoint_is_found_by_id_by_folder_and_by_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "local" / "runs")
    made = train(tmp_path / "runs" / "local", run, 2, 4)
    for place, source in enumerate(("run-1", "runs/local/runs/run-1", "runs/local", str(made / "run-1-000004"))):
        result = export(source, f"model-{place}")
        assert result.exit_code == 0 and result.stdout.strip() == f"model-{place}", result.stderr
        assert "run-1 after 2 optimizer steps: whole weights of 430,944 parameters" in result.stderr
        assert f"up --model model-{place}" in result.stderr
        AutoModelForCausalLM.from_pretrained(tmp_path / f"model-{place}")
    result = export("run-1", "earlier", "--step", "2")
    assert "run-1 after 1 optimizer steps" in result.stderr


def test_checkpoints_below_the_folder_of_runs_and_elsewhere_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "runs")
    train(tmp_path / "runs", run, 4)  # as `python -m mulligan.trainer` has them by default
    assert export("run-1", "model").exit_code == 0
    (tmp_path / "runs" / "checkpoints").rename(tmp_path / "elsewhere")
    result = export("run-1", "again")
    assert result.exit_code == 1 and "a checkpoint run-1-000004, which is gone: none lies in " in result.stderr
    assert str(tmp_path / "runs" / "checkpoints" / "run-1") in result.stderr and "--checkpoints" in result.stderr
    assert export("run-1", "again", "--checkpoints", "elsewhere").exit_code == 0
    monkeypatch.setenv("MULLIGAN_TRAINER_CHECKPOINT_FOLDER", str(tmp_path / "elsewhere"))  # as in the trainer's image
    assert export("run-1", "third").exit_code == 0


def test_an_adapter_and_whole_weights_of_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", model={"lora": {"rank": 2}})
    train(tmp_path / "runs", run, 4)
    result = export("run-1", "adapter")
    assert "an adapter of " in result.stderr and (tmp_path / "adapter" / "adapter_config.json").exists()
    result = export("run-1", "merged", "--merge")
    assert "whole weights of 430,944 parameters" in result.stderr
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_run_whose_model_lies_elsewhere_needs_its_place(tmp_path: Path) -> None:
    tiny = write_tiny_model(tmp_path / "tiny")
    run = make_run(tmp_path / "runs", model={"source": str(tiny)})
    train(tmp_path / "runs", run, 4)
    tiny.rename(tmp_path / "moved")
    result = export("run-1", "model")
    assert result.exit_code == 1 and "--model names another place of it" in result.stderr
    assert export("run-1", "model", "--model", "moved").exit_code == 0
    assert export("run-1", "other", "--model", "embedded").exit_code == 1


def test_plug_ins_that_other_settings_name_need_not_be_here(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    train(tmp_path / "runs", run, 4)
    record = run.record()
    record.settings["algorithm"]["name"] = "of_a_plug_in"
    run.write_record(record)
    assert export("run-1", "model").exit_code == 0


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("run-2", "out"), 2, "run-2: no run below runs has this id; did you mean 'run-1'?"),
        (("empty", "out"), 2, "empty: this folder has no run (a run has run.json)"),
        (("runs", "out"), 2, "runs has 3 runs: name one of their folders"),
        (("memory", "out"), 2, 'run memory has learner = "none"'),
        (("run-1", "out", "--merge"), 2, "--merge: run run-1 trained the weights themselves"),
        (
            ("run-1", "out", "--step", "3"),
            1,
            "run run-1 has no checkpoint after 3 steps: there are those after 4 steps",
        ),
        (("new", "out"), 1, "run new has no checkpoint yet: none lies in "),
        (("run-1", "full"), 2, "is not empty: expected a new or an empty folder"),
        (("alone/checkpoints/gone/gone-000001", "out"), 2, "is a checkpoint of gone, and its run is neither in "),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path: Path, words: tuple[str, ...], status: int, said: str) -> None:
    run = make_run(tmp_path / "runs")
    train(tmp_path / "runs", run, 4)
    make_run(tmp_path / "runs", "new", last=None)
    make_run(tmp_path / "runs", "memory", learner="none")
    for name in ("empty", "full", "full/inside", "alone/checkpoints/gone/gone-000001"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "alone/checkpoints/gone/gone-000001/manifest.json").write_text("{}")
    result = export(*words)
    assert result.exit_code == status, result.stderr
    assert said in result.stderr and not (tmp_path / "out").exists()
