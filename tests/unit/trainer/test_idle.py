"""Runs that learn nothing, and settings that mean nothing: a notice says so."""

from __future__ import annotations

import tomllib
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from mulligan.trainer.algorithms import rlvr
from mulligan.trainer.preflight import idle_notices
from mulligan.trainer.settings import ALGORITHMS, RunSettings
from tests.support.fakes import FakeEnvironment
from tests.support.loop import Loop, in_turn
from tests.support.paths import ROOT
from tests.unit.trainer.test_run import World, notices

ONE = {"rollouts_per_task": 1}
NO_KL = {"kl_coefficient": 0.0}
ALONE = 'learner: nothing is learned: with "none" the memory alone learns, and '


async def told(folder: Path, **changes: Any) -> list[str]:
    """The notices of a run of four steps. A third of its attempts solve their tasks."""
    world = World(folder, **{"steps": 4, "loss": NO_KL} | changes)
    await world.run().train()
    return notices(world.run())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"algorithm": {"name": "rlvr"}, "learner": "none"}, ALONE + 'algorithm "rlvr" writes nothing into it'),
        ({"algorithm": {"name": "nft"}, "learner": "none"}, ALONE + 'algorithm "nft" writes nothing into it'),
        ({"algorithm": {"name": "chain_sft"}, "learner": "none"}, ALONE + 'algorithm "chain_sft" writes nothing'),
        (
            {"algorithm": {"name": "erl", "memory_writes": "none"}, "learner": "none"},
            ALONE + 'algorithm.memory_writes is "none"',
        ),
        (
            {"algorithm": {"name": "erl", "memory_writes": "none"}, "learner": "none"},
            "algorithm.memory_entries: nothing is read from the run's own scope",
        ),
        (
            {"algorithm": {"name": "ruscarl", "memory_entries": 2}},
            "algorithm.memory_entries: nothing is read from the run's own scope of the memory unless somebody else "
            'fills it, because algorithm "ruscarl" writes nothing into it; algorithm.memory_scope names another scope',
        ),
        (
            {"algorithm": {"name": "rlvr"}, "rollout": ONE},
            "nothing to train on: no datum of steps 0 to 2 has a gradient; a group of one "
            "(rollout.rollouts_per_task = 1) is compared with nothing",
        ),
        (
            {"algorithm": {"name": "rlvr"}, "rollout": ONE, "loss": {"kl_coefficient": 0.1}},
            "no datum of steps 0 to 2 has a gradient but that of the KL divergence or entropy",
        ),
        ({"algorithm": {"name": "rlvr", "first_weight": 0}}, "nothing to train on: no datum of steps 0 to 2 has a"),
        ({"algorithm": {"name": "rlvr", "first_weight": 0}, "steps": 2}, "no datum of steps 0 to 1 has a gradient"),
        ({"algorithm": {"name": "rlvr", "first_weight": 0}, "steps": 1}, "no datum of step 0 has a gradient"),
        (
            {"algorithm": {"name": "context_distillation", "memory_entries": 0}},
            "nothing to train on: no datum of steps 0 to 2 has a gradient",
        ),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate: nothing is learned with 0"),
    ],
)
async def test_a_run_that_learns_nothing_says_so_once(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    texts = await told(tmp_path, **changes)
    assert len([text for text in texts if expected in text]) == 1, texts


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"name": "erl"}},
        {"algorithm": {"name": "rlvr"}, "rollout": {"rollouts_per_task": 8}},
        {"algorithm": {"name": "reflect_retry_reward", "reflections": 8}, "rollout": ONE},
        {"algorithm": {"name": "rlvr", "advantage": "raft"}, "rollout": ONE | {"tasks_per_step": 16}},
        {"algorithm": {"name": "erl"}, "learner": "none"},
        {"algorithm": {"name": "rlvr", "memory_episodes": True}, "learner": "none"},
        {"algorithm": {"name": "erl", "memory_writes": "none", "memory_scope": "global"}, "learner": "none"},
        {"algorithm": {"name": "ruscarl", "hints": ["h"]}, "rollout": {"rollouts_per_task": 8}},
        {
            "algorithm": {"name": "ruscarl", "memory_entries": 2, "memory_scope": "a"},
            "rollout": {"rollouts_per_task": 8},
        },
    ],
)
async def test_a_run_that_learns_has_no_such_notice(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert await told(tmp_path, **changes) == []


async def test_without_a_learner_what_an_algorithm_does_not_say_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(rlvr, "REMEMBERS")
    texts = await told(tmp_path, algorithm={"name": "rlvr"}, learner="none")
    assert texts == ["nothing learned: steps 0 to 2 left nothing in the memory, and the run has no learner"]


PLAYED: dict[str, Any] = {"ruscarl": {"hints": ["rule"]}, "spar": {"depth": 1}}


@pytest.mark.parametrize("name", ALGORITHMS.built_in)
async def test_an_algorithm_remembers_where_it_says_so(name: str) -> None:
    say = in_turn(cycle(["a", "b"]), cycle(["go"]), cycle(["rule"]))
    made = Loop(
        say, algorithm={"name": name} | PLAYED.get(name, {}), environment=FakeEnvironment({"t0": "go"}, turns=1)
    )
    experiences = await made.step()
    assert made.runner.leaves(experiences) is ALGORITHMS.find(name).REMEMBERS


def given(algorithm: dict[str, Any], **tables: Any) -> list[str]:
    """The settings that have no effect with the algorithm."""
    run = RunSettings.model_validate({"environment": "e", "algorithm": algorithm} | tables)
    assert idle_notices(RunSettings.model_validate(run.model_dump(mode="json"))) == idle_notices(run), "as it is stored"
    end = f': it has no effect with algorithm.name = "{algorithm["name"]}"'
    return [text.removesuffix(end) for text in idle_notices(run) if text.endswith(end)]


@pytest.mark.parametrize(
    ("algorithm", "loss", "expected"),
    [
        ({"name": "raw_retry", "reflection_weight": 0.5}, {}, ["algorithm.reflection_weight"]),
        ({"name": "try_again", "memory_entries": 1}, {}, ["algorithm.memory_entries"]),
        ({"name": "try_again", "memory_entries": 1, "memory_readers": "first"}, {}, []),
        ({"name": "nft", "advantage": "rloo"}, {}, ["algorithm.advantage"]),
        ({"name": "nft", "normalize_by_std": False}, {}, ["algorithm.normalize_by_std"]),
        ({"name": "nft"}, {"name": "gspo"}, ["loss.name"]),
        ({"name": "nft", "aggregation": "constant", "aggregation_constant": 9}, {}, []),
        (
            {"name": "dpo_pairs", "aggregation": "token_mean", "advantage": "rloo"},
            {},
            ["algorithm.advantage", "algorithm.aggregation"],
        ),
        ({"name": "dpo_pairs"}, {"kl_reference": "moving", "reference_every": 9, "kl_coefficient": 0}, []),
        (
            {"name": "hindsight"},
            {"kl_reference": "moving", "reference_every": 9, "kl_coefficient": 0.5, "clip_low": 0.1},
            ["loss.clip_low", "loss.kl_coefficient", "loss.kl_reference", "loss.reference_every"],
        ),
        ({"name": "expert_iteration", "advantage_settings": {}, "thresholds": [0.5]}, {}, ["algorithm.thresholds"]),
        ({"name": "expert_iteration", "filter": "rest", "thresholds": [0.5]}, {}, []),
        ({"name": "hindsight", "recompute_log_probs": False}, {}, ["algorithm.recompute_log_probs"]),
        ({"name": "nft", "recompute_log_probs": False}, {}, ["algorithm.recompute_log_probs"]),
        ({"name": "rlvr", "recompute_log_probs": False}, {}, []),
        ({"name": "sdpo", "advantage": "rloo"}, {"name": "gspo"}, ["algorithm.advantage", "loss.name"]),
        ({"name": "sdpo", "advantage": "rloo", "first_weight": 1}, {"name": "gspo"}, []),
        ({"name": "rlvr", "advantage": "rloo"}, {"name": "gspo", "kl_coefficient": 0.5}, []),
        ({"name": "rlvr", "memory_writes": "all"}, {}, ["algorithm.memory_writes"]),
        ({"name": "erl", "memory_writes": "all", "train_cut_reflections": True}, {}, []),
        ({"name": "ruscarl", "hints": ["h"], "memory_entries": 1}, {}, ["algorithm.memory_entries"]),
        ({"name": "ruscarl", "memory_entries": 1}, {}, []),
    ],
)
def test_what_means_nothing_to_the_algorithm_is_told(
    algorithm: dict[str, Any], loss: dict[str, Any], expected: list[str]
) -> None:
    assert given(algorithm, loss=loss) == expected


def test_the_mismatch_is_corrected_by_the_ratio_itself_without_recomputed_log_probs() -> None:
    table = {"name": "rlvr", "recompute_log_probs": False}
    loss = {"mismatch_correction": "masked", "mismatch_limit": 3.0}
    run = RunSettings.model_validate({"environment": "e", "algorithm": table, "loss": loss})
    said = "it has no effect with algorithm.recompute_log_probs = false"
    assert idle_notices(run) == [f"loss.mismatch_correction: {said}", f"loss.mismatch_limit: {said}"]
    assert idle_notices(RunSettings.model_validate({"environment": "e", "algorithm": table})) == []


def test_what_has_two_reasons_is_told_once() -> None:
    table = {"name": "dpo_pairs", "advantage": "rloo", "normalize_by_std": False, "aggregation_constant": 9}
    told = idle_notices(RunSettings.model_validate({"environment": "e", "algorithm": table}))
    fields = [text.partition(":")[0] for text in told]
    assert fields == ["algorithm.advantage", "algorithm.aggregation_constant", "algorithm.normalize_by_std"]


@pytest.mark.parametrize("name", ALGORITHMS.built_in)
def test_settings_without_effect_are_settings(name: str) -> None:
    table = {"name": name} | PLAYED.get(name, {})
    run = RunSettings.model_validate({"environment": "e", "algorithm": table})
    algorithm, loss = type(run.algorithm).model_fields, type(run.loss).model_fields
    known = {*algorithm, *(f"loss.{setting}" for setting in loss)}
    assert run.algorithm.without_effect <= known
    assert given(table) == [], "what nobody gave"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_set_nothing_in_vain(recipe: Path) -> None:
    table = tomllib.loads(recipe.read_text())
    assert idle_notices(RunSettings.model_validate(table)) == []
