"""Runs that learn nothing, and settings that mean nothing: a notice says so."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from mulligan.trainer.algorithms import rlvr
from mulligan.trainer.settings import ALGORITHMS
from tests.support.fakes import FakeEnvironment
from tests.support.loop import Loop, in_turn
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
