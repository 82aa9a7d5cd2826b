"""The published settings are files; baselines and ablations are the same code with other settings."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from mulligan.cli.train import read_settings
from mulligan.env.config import EnvSettings
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import RunSettings
from tests.support.paths import ROOT

FOLDER = ROOT / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
PAPER = FOLDER / "frozenlake-paper.toml"
# Published tasks: turns of an attempt, and tokens of a response, which are those of all its turns.
PUBLISHED = {"frozenlake": (8, 10_240), "sokoban": (8, 10_240), "hotpotqa": (5, 8_192)}


def changed(one: Any, other: Any, path: str = "") -> set[str]:
    """Names of the settings in which two runs differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {found for name in one for found in changed(one[name], other[name], f"{path}.{name}".lstrip("."))}
    return set() if one == other else {path}


def plain(settings: RunSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json")


def test_the_recipes_are_there() -> None:
    names = {path.stem for path in RECIPES}
    assert {f"{game}{arm}" for game in ("frozenlake-3x3", "sokoban-small") for arm in ("", "-rlvr")} <= names
    assert {f"{game}-paper{arm}" for game in PUBLISHED for arm in ("", "-rlvr")} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_names_an_environment_that_is_served(path: Path) -> None:
    settings = RunSettings.model_validate(tomllib.loads(path.read_text()))
    assert settings.environment in EnvSettings.load([]).environments


@pytest.mark.parametrize("arm", ["", "-rlvr"])
def test_small_sokoban_is_the_run_of_frozenlake_in_another_environment(arm: str) -> None:
    lake, sokoban = (
        plain(read_settings(FOLDER / f"{game}{arm}.toml", [])) for game in ("frozenlake-3x3", "sokoban-small")
    )
    assert changed(lake, sokoban) - {"evaluation.every"} == {"environment"}


@pytest.mark.parametrize("game", PUBLISHED)
def test_the_published_settings(game: str) -> None:
    run = read_settings(FOLDER / f"{game}-paper.toml", [])
    turns, tokens = PUBLISHED[game]
    assert (run.model.source, run.environment) == ("Qwen/Qwen3-4B-Instruct-2507", game)
    assert EnvSettings.load([]).create_environments()[game].info.max_steps == turns
    rollout = run.rollout
    evaluation = run.evaluation
    loss = run.loss
    assert isinstance(loss, ppo.Settings)
    assert (rollout.tasks_per_step, rollout.rollouts_per_task, rollout.temperature, rollout.top_p) == (64, 4, 0.7, 1.0)
    assert (rollout.reflection_temperature, rollout.reflection_top_p) == (0.5, 0.9)
    assert (rollout.max_tokens, rollout.reflection_max_tokens) == (tokens // turns, tokens)
    assert (evaluation.every, evaluation.samples, evaluation.tasks) == (5, 4, 0)
    assert (evaluation.temperature, evaluation.top_p, evaluation.top_k) == (0.7, 0.8, 20)
    assert (loss.clip_low, loss.clip_high, loss.dual_clip, run.loss.kl_coefficient) == (0.2, 0.28, 3.0, 0.001)
    assert (run.optimizer.learning_rate, run.optimizer.weight_decay, run.optimizer.max_grad_norm) == (1e-6, 0.01, 1.0)
    assert run.algorithm.name == "erl" and run.algorithm.memory_entries == 1


@pytest.mark.parametrize("game", PUBLISHED)
def test_rlvr_is_the_same_run_without_a_second_attempt_at_the_same_budget(game: str) -> None:
    erl, rlvr = (read_settings(FOLDER / f"{game}-paper{arm}.toml", []) for arm in ("", "-rlvr"))
    whole = plain(erl)
    whole["algorithm"] = {name: value for name, value in whole["algorithm"].items() if name in plain(rlvr)["algorithm"]}
    differences = changed(whole, plain(rlvr))
    differences = {name for name in differences if not name.startswith("rollout.reflection_")}  # there are none
    differences.remove("algorithm.memory_entries")  # there is nothing to remember
    assert differences == {"algorithm.name", "rollout.rollouts_per_task"}
    assert rlvr.algorithm.name == "rlvr" and rlvr.rollout.rollouts_per_task == 10


def test_rlvr_of_the_language_model_differs_in_the_algorithm_and_its_budget_alone() -> None:
    erl, rlvr = (read_settings(FOLDER / f"short-sentences-smollm2{arm}.toml", []) for arm in ("", "-rlvr"))
    assert (erl.algorithm.name, rlvr.algorithm.name) == ("erl", "rlvr")
    whole, other = (plain(arm) | {"algorithm": {}} for arm in (erl, rlvr))
    differences = {name for name in changed(whole, other) if not name.startswith("rollout.reflection_")}
    assert differences == {"rollout.rollouts_per_task"}
    # A chain of ERL is an attempt, and while most fail a reflection and another attempt.
    assert rlvr.rollout.rollouts_per_task == 3 * erl.rollout.rollouts_per_task
    assert erl.algorithm.optimizer_steps == rlvr.algorithm.optimizer_steps


@pytest.mark.parametrize(
    "setting",
    [
        "algorithm.memory_entries=0",
        "algorithm.name=raw_retry",
        "algorithm.name=try_again",
        "algorithm.distillation_weight=0",
    ],
)
def test_an_ablation_is_one_setting(setting: str) -> None:
    whole = read_settings(PAPER, [])
    ablated = read_settings(PAPER, [setting])
    assert changed(plain(whole), plain(ablated)) == {setting.partition("=")[0]}
