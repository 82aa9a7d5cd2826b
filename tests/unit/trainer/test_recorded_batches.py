"""ERL, RLVR and the paper's ablations give the data that they gave when they were recorded, bit by bit.

`recorded/batches.json` was written by the code before algorithms were modules. It holds, for each arm, every datum of
every optimizer step: its id, branch, weight, temperature and objective, and a digest of its tokens and
log-probabilities. `python -m tests.unit.trainer.test_recorded_batches` writes it anew; that is right only for a change
that is meant to change what is trained on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.inference import SamplingParams
from mulligan.trainer.data import Datum, Distillation, PolicyGradient
from mulligan.trainer.harness import Harness
from mulligan.trainer.sampling import NamedPolicy
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.step import StepRunner
from tests.support.fakes import FakeEnvironment, FakeLearner, FakeMemory, FakePolicy, timeout

RECORDED = Path(__file__).parent / "recorded" / "batches.json"
TASKS = {"t0": "go", "t1": "stay", "t2": "go"}
STEPS = 3
ARMS: dict[str, dict[str, Any]] = {
    "erl": {},
    "rlvr": {"algorithm": {"second_attempt": "none"}},
    "without-memory": {"algorithm": {"memory_entries": 0}},
    "without-reflection": {"algorithm": {"second_attempt": "raw_retry"}},
    "without-distillation": {"algorithm": {"distillation_weight": 0.0}},
    "try-again": {"algorithm": {"second_attempt": "try_again"}},
    "cross-entropy": {"algorithm": {"distillation_loss": "cross_entropy", "distillation_baseline": True}},
    "chains": {"algorithm": {"branch_normalization": "chains", "normalize_by_std": False, "first_weight": 0.5}},
    "trainable": {"algorithm": {"branch_normalization": "trainable", "optimizer_steps": 3, "second_weight": 0.25}},
    "cut-reflections": {"algorithm": {"train_cut_reflections": True}, "loss": {"kl_coefficient": 0.1}},
    "reflector": {"policies": {"reflector": "other"}},
    "rewrites": {"rewrites": True},
}


def answer(system: str, last: str, sampling: SamplingParams) -> str:
    """Depends on the prompt and the seed alone. Later attempts are right more often; some reflections are cut."""
    draw = derive_seed(system, last, sampling.seed)
    if system == "reflect":
        return f"I see. <prompt>rule {draw % 7}{' and more' * (draw % 5)}</prompt>"
    wrong = ["a", "b", "c"][: 3 if system == "solve" else 1]
    return [*wrong, "go", "stay"][draw % (len(wrong) + 2)]


def fail(episode_id: str) -> None:
    if derive_seed(episode_id.rpartition("-")[0]) % 13 == 0:
        raise timeout()


async def batches(arm: str) -> list[list[dict[str, Any]]]:
    """The data of each optimizer step of the arm."""
    changes = {name: value for name, value in ARMS[arm].items() if name != "rewrites"}
    plain: dict[str, Any] = {
        "environment": "fake",
        "seed": 7,
        "rollout": {"tasks_per_step": 3, "rollouts_per_task": 4, "reflection_max_tokens": 40, "max_restarts": 1},
        "loss": {"kl_coefficient": 0.0},
    }
    settings = RunSettings.model_validate(plain | changes)
    policy = FakePolicy(answer, rewrites_history="rewrites" in ARMS[arm])
    policy.others["other"] = FakePolicy(answer, fingerprint="another")
    environment = FakeEnvironment(TASKS, turns=2, fail=fail, in_parts=True)
    info = await environment.describe("fake")
    named = settings.policies.reflector
    speakers = {"reflector": await NamedPolicy.open(policy, named)} if named else {}
    harness = Harness(environment, policy, info, await policy.info(), "x", 1, speakers)
    learner = FakeLearner()
    memory = FakeMemory()
    runner = StepRunner("run", settings, harness, memory, learner)
    for step in range(STEPS):
        experiences = await runner.sample(step, list(TASKS), await memory.snapshot("run"))
        await runner.learn(step, experiences)
        await runner.memorise(experiences)
    return [[told(datum) for datum in minibatch] for minibatch in learner.steps]


def told(datum: Datum) -> dict[str, Any]:
    objective = datum.objective
    plain: dict[str, Any] = {"id": datum.datum_id, "branch": datum.branch, "weight": datum.weight.hex()}
    plain["temperature"] = datum.temperature
    logs: tuple[Any, ...] = ()
    if isinstance(objective, PolicyGradient):
        plain["advantage"] = objective.advantage.hex()
        logs = (objective.rollout_log_probs, objective.old_log_probs)
    else:
        assert isinstance(objective, Distillation)
        plain["target_weight"] = objective.target_weight.hex()
    tokens = repr((datum.token_ids, datum.loss_mask, *logs))
    return plain | {"tokens": hashlib.sha256(tokens.encode()).hexdigest()[:16]}


@pytest.mark.parametrize("arm", ARMS)
async def test_an_arm_gives_the_data_that_were_recorded(arm: str) -> None:
    recorded = json.loads(RECORDED.read_text())[arm]
    now = await batches(arm)
    assert [len(minibatch) for minibatch in now] == [len(minibatch) for minibatch in recorded]
    for minibatch, expected in zip(now, recorded, strict=True):
        for datum, before in zip(minibatch, expected, strict=True):
            assert datum == before


def test_the_recorded_arms_cover_every_branch_and_the_exclusions() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert recorded.keys() == ARMS.keys()
    branches = {arm: {datum["branch"] for step in steps for datum in step} for arm, steps in recorded.items()}
    assert branches["erl"] == {"first", "reflection", "second", "distilled"} and branches["rlvr"] == {"first"}
    assert branches["reflector"] == branches["try-again"] == {"first", "second", "distilled"}
    assert len({json.dumps(steps) for steps in recorded.values()}) == len(ARMS), "the arms differ"


if __name__ == "__main__":
    lines = {arm: asyncio.run(batches(arm)) for arm in ARMS}
    RECORDED.write_text(json.dumps(lines, indent=None, separators=(",", ":")) + "\n")
