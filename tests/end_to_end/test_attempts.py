"""What a run trains on, over real services: small rewards, long ids, and what fits neither policy nor learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.events import EvaluationEvent, StepEvent

PAYING = {"kind": "tests.support.paying"}
LONG_IDS = ["t" * 199, "ü/" * 100, "a/b", "a-b"]
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "tenths": PAYING | {"tasks": LONG_IDS},
    # x leaves room for a turn or two; the second attempt has a reflection in its place.
    "long-x": PAYING | {"solver_letters": 960, "max_steps": 30, "reward": 0.01},
    "too-long-x": PAYING | {"solver_letters": 1100},
}
SMALL = {"steps": 2, "checkpoint_every": 1, "rollout": {"tasks_per_step": 2, "reflection_max_tokens": 8}}


@pytest.fixture(scope="module")
def loop(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    return Loop.start(shared_services, tmp_path_factory.mktemp("loop"), env={"environments": ENVIRONMENTS})


async def events(loop: Loop, run_id: str) -> list[Any]:
    client = loop.client()
    try:
        return [entry.event async for entry in client.watch(run_id)]
    finally:
        await client.close()


async def test_ten_tenths_solve_a_task_whatever_its_id(loop: Loop) -> None:
    await loop.train("tenths", small_run(environment="tenths", **SMALL | {"steps": 4}))
    found = await events(loop, "tenths")
    steps = [event.metrics for event in found if isinstance(event, StepEvent)]
    assert [(step["success_first"], step["excluded"], step["reflections"]) for step in steps] == [(1, 0, 0)] * 4
    evaluations = [event for event in found if isinstance(event, EvaluationEvent)]
    assert {(event.success, event.attempts, event.excluded) for event in evaluations} == {(1, 4, 0)}
    assert {chain.task_id for chain in loop.experiences("tenths")} == set(LONG_IDS)


async def test_distilled_copies_that_no_learner_takes_are_left_out(loop: Loop) -> None:
    await loop.train("long-x", small_run(environment="long-x", loss={"kl_coefficient": 0.01}, **SMALL))
    chains = loop.experiences("long-x")
    for chain in chains:
        assert chain.target("distilled") is not None and len(chain.targets[0].sequences[0].token_ids) > 1024
    steps = [event.metrics for event in await events(loop, "long-x") if isinstance(event, StepEvent)]
    assert sum(step["dropped_too_long"] for step in steps) == len(chains) == 8
    assert {name for step in steps for name in step if name.endswith("/loss")} >= {"first/loss", "second/loss"}
    assert not any(name.startswith("distilled/") for step in steps for name in step)
    (notice,) = [text for text in await loop.notices("long-x") if "too_long" in text]
    assert "longer than the model's context" in notice


async def test_prompts_that_never_fit_end_the_run_at_once(loop: Loop, tmp_path: Path) -> None:
    client = loop.client()
    try:
        await client.start("too-long-x", small_run(environment="too-long-x", **SMALL))
        error = await loop.failure("too-long-x")
        assert "no attempt could begin: the first prompt has 11" in error
        assert "tokens, and the policy's context is 1024" in error
        assert loop.experiences("too-long-x") == []
    finally:
        await client.close()
