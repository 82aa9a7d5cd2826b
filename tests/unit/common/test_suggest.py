"""A wrong name comes first, and the nearest right one with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.cli.train import _plain_name, read_settings
from mulligan.common.config import ServiceSettings
from mulligan.common.errors import DomainError
from mulligan.common.suggest import did_you_mean
from mulligan.env.base import read_settings as read_environment
from mulligan.env.config import EnvSettings
from mulligan.env.envs.frozenlake import Settings
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.wire import validated


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"stpes": 3}, "stpes: no such setting; did you mean 'steps'?"),
        ({"environment": "x", "stpes": 3}, "stpes: no such setting; did you mean 'steps'?"),
        ({"model": {"lora": {"rnk": 16}}}, "model.lora.rnk: no such setting; did you mean 'rank'?"),
        ({"rollout": {"temprature": 1}}, "rollout.temprature: no such setting; did you mean 'temperature'?"),
        (
            {"environment": "x", "loss": {"zzz": 1}},
            "loss.zzz: no such setting of loss 'ppo'; there are: name",
        ),
        ({"steps": 3}, "environment: Field required"),
    ],
)
def test_settings_of_a_run(plain: dict[str, Any], said: str) -> None:
    with pytest.raises(DomainError) as caught:
        validated(RunSettings, plain)
    assert caught.value.message.startswith(said)
    assert caught.value.metadata["field"] == said.partition(":")[0]


def test_overrides_of_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('environment = "frozenlake-3x3"\n')
    with pytest.raises(SystemExit) as caught:
        read_settings(recipe, ["model.lora.rnk=16"])
    assert caught.value.code == 2
    assert "model.lora.rnk: no such setting; did you mean 'rank'?" in capsys.readouterr().err


def test_settings_of_a_service(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "env.toml"
    config.write_text("lease_secnds = 3\nport = 1")
    with pytest.raises(SystemExit) as caught:
        EnvSettings.load(["--config", str(config)])
    assert caught.value.code == 2
    assert "lease_secnds: no such setting; did you mean 'lease_seconds'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        EnvSettings.load(["--lease-secnds", "3"])
    assert "did you mean '--lease-seconds'?" in capsys.readouterr().err
    monkeypatch.setenv("MULLIGAN_ENV_LEASE_SECNDS", "3")
    with pytest.raises(SystemExit):
        EnvSettings.load([])
    assert "did you mean 'MULLIGAN_ENV_LEASE_SECONDS'?" in capsys.readouterr().err
    assert issubclass(EnvSettings, ServiceSettings)


def test_settings_of_an_environment() -> None:
    with pytest.raises(ValueError, match=r"size_mni: no such setting; did you mean 'size_min'\?; there are: "):
        read_environment(Settings, {"size_mni": 3})


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    assert did_you_mean("zebra", ["steps", "seed"]) == "" == did_you_mean("x", [])
    assert did_you_mean("STEPS", ["steps"]) == "; did you mean 'steps'?"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Übung 1", "Ubung-1"),
        ("_draft", "draft"),
        ("...", "run"),
        ("日本語", "run"),
        ("a" * 300, "a" * 40),
        ("frozenlake-3x3", "frozenlake-3x3"),
        ("x/y:z", "x-y-z"),
    ],
)
def test_a_run_is_named_after_any_file(file: str, name: str) -> None:
    assert _plain_name(file) == name
