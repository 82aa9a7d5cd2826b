"""ERL trains an adapter of SmolLM2-135M-Instruct, which a real SGLang serves on the CPU. The canary checks every
version. At the end each is served once more, to see that every update changed the answers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from mulligan.cli.train import read_settings
from mulligan.common.channel import Endpoint
from mulligan.common.inference import WeightsKind
from mulligan.policy.client import PolicyClient
from mulligan.testing.agreement import greatest_difference
from mulligan.testing.loop import Loop
from mulligan.testing.processes import ServiceProcesses
from mulligan.testing.sglang_servers import LAUNCH_SECONDS, launch_settings, python_of_sglang
from proof import CaseUnavailable
from proof.language_model import MODEL, model_folder

RUN = "adapters"
_SECONDS = 1500.0  # of the run, on a busy machine
STEPS = 3
# Differences in log-probability, in float32. The canaries of two runs of four versions found 1.6e-5 to 5.3e-5:
# TOLERANCE is four times the greatest. The steps changed an answer by 0.18 to 0.42: CHANGED is a ninth of the least,
# and a hundred times what a canary may find. So the weights before a step would not pass for those after it.
TOLERANCE = 2e-4
CHANGED = 2e-2
_FLAGS = ("--max-total-tokens", "8192")  # of SGLang's cache: 0.4 GB; a call needs some 150
_SETTINGS = (
    *("checkpoint_every=1", "evaluation.every=0", "evaluation.tasks=1"),
    *("model.lora.rank=8", 'model.lora.target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]'),
    *("rollout.tasks_per_step=1", "rollout.rollouts_per_task=2", "algorithm.optimizer_steps=1"),
    *("rollout.max_tokens=12", "rollout.reflection_max_tokens=12"),
    "loss.entropy_coefficient=0.01",  # a gradient also where the rewards of two chains are equal
)


def measure(steps: int, folder: Path) -> dict[str, Any]:
    """The run, in an empty folder. Raises AssertionError where it is not what it must be."""
    model = model_folder()
    if not python_of_sglang():
        raise CaseUnavailable("MULLIGAN_TEST_SGLANG_PYTHON: the interpreter of an environment with SGLang")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    services = ServiceProcesses(folder)
    try:
        measured = train(services, folder, model, steps)
    finally:
        services.end()
    assert_verified(measured, steps)
    return measured


def train(services: ServiceProcesses, folder: Path, model: Path, steps: int) -> dict[str, Any]:
    """Each version that served with its canary's difference, and the greatest change of an answer's log-probability
    since the version before; each step with its gradient's norm, and the divergence of trainer and engine."""
    policy: dict[str, Any] = {"backend": "sglang", "model": model, "sglang": launch_settings(flags=_FLAGS)}
    policy |= {"keep_versions": steps + 1, "start_seconds": LAUNCH_SECONDS}
    loop = Loop.start(services, folder, policy=policy, trainer={"models_folder": model.parent})
    return asyncio.run(_train(loop, model, steps))


async def _train(loop: Loop, model: Path, steps: int) -> dict[str, Any]:
    client = PolicyClient(Endpoint(loop.policy.address), timeout=600)
    try:
        given = [*_SETTINGS, f"steps={steps}", f"model.source={model}"]
        settings = read_settings(Path("short-sentences-smollm2"), given)
        await loop.train(RUN, settings, _SECONDS)
        steps_measured = await loop.metrics(RUN)
        versions = {version.policy_version: version for version in await client.versions()}
        answers = [chain["first"].sequences[0].token_ids for chain in loop.experiences(RUN)[:2]]
        log_probs = await _log_probs(client, sorted(versions, reverse=True), answers)
    finally:
        await client.close()
    changes = {
        later: greatest_difference(log_probs[earlier], log_probs[later])
        for earlier, later in pairwise(sorted(versions))
    }
    return {
        "model": MODEL,
        "rank": settings.model.lora.rank if settings.model.lora else 0,
        "versions": [
            {
                "policy_version": number,
                "kind": str(versions[number].kind),
                "canary": versions[number].canary_difference,
                "changed_answers": changes.get(number),
            }
            for number in sorted(versions)
        ],
        "steps": [
            {name: metrics.get(name, 0.0) for name in ("rollouts", "grad_norm", "mismatch_kl", "excluded", "seconds")}
            for metrics in steps_measured
        ],
    }


async def _log_probs(
    client: PolicyClient, versions: Sequence[int], sequences: Sequence[Sequence[int]]
) -> dict[int, Sequence[Sequence[float]]]:
    """Of the sequences under each version; the first of `versions` serves, and a rollback only goes back."""
    found: dict[int, Sequence[Sequence[float]]] = {}
    for number in versions:
        await client.rollback(number)
        scored = await client.score(sequences)
        assert scored.policy_version == number
        found[number] = scored.log_probs
    return found


def assert_verified(measured: dict[str, Any], steps: int) -> None:
    """The model as it comes, the adapter before the first step, and one after each."""
    original, untrained, *trained = measured["versions"]
    assert [one["kind"] for one in measured["versions"]] == [WeightsKind.ORIGINAL, *[WeightsKind.LORA] * (steps + 1)]
    assert original["canary"] is None and untrained["changed_answers"] <= TOLERANCE, measured
    assert all(one["canary"] <= TOLERANCE for one in (untrained, *trained)), measured
    for version, step in zip(trained, measured["steps"], strict=True):
        assert step["excluded"] == 0 and abs(step["mismatch_kl"]) < 1e-6, measured
        assert step["grad_norm"] > 0 and version["changed_answers"] >= CHANGED, measured


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {"sglang-adapters": partial(measure, STEPS)}
