"""A Qwen3 gives way to a Llama with another tokenizer while everything runs; then one setting trains the Llama."""

from __future__ import annotations

import asyncio
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from mulligan.cli.app import app
from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.experience import Sample
from mulligan.common.inference import (
    CallOptions,
    Completion,
    PolicyInfo,
    Prompt,
    PublishedWeights,
    SamplingParams,
    WeightsKind,
)
from mulligan.common.types import Split
from mulligan.env.client import EnvClient
from mulligan.policy.client import PolicyClient
from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.harness import Harness
from mulligan.trainer.settings import EvaluationSettings, RunSettings
from tests.support.llama_model import write_llama_model
from tests.support.playing import play_episode

LAKE = "frozenlake-3x3"
ENVIRONMENTS = {
    LAKE: {"kind": "frozenlake", "size_min": 3, "size_max": 3, "prompts": "compact"},
    "second-try": {"kind": "tests.support.second_try"},  # even a model that knows nothing has something to learn
}
SETTINGS = small_run(environment="second-try", steps=2, evaluation={"tasks": 1})


class Watched:
    """A speaker that notes which version answered, session by session."""

    def __init__(self, policy: PolicyClient):
        self._policy = policy
        self.answers: list[tuple[str, int]] = []

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = CallOptions()
    ) -> Completion:
        completion = await self._policy.generate(prompt, sampling, options)
        self.answers += [(options.session_id, span.policy_version) for span in completion.policy_versions]
        return completion

    async def tokenize(self, prompt: Prompt | str, options: CallOptions = CallOptions()) -> tuple[int, ...]:
        return await self._policy.tokenize(prompt, options)

    @property
    def sessions(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for session, version in self.answers:
            found.setdefault(session, set()).add(version)
        return found


async def play(env: EnvClient, watched: Watched, info: PolicyInfo) -> list[Sample]:
    """Sixteen play episode after episode, until another version than the first has answered one of them."""
    lake = await env.describe(LAKE)
    tasks = await env.list_tasks(LAKE, Split.TEST, 16)
    harness = Harness(env, watched, lake, info, "x", max_restarts=0)
    attempts: list[Sample] = []

    async def one_after_another(task_id: str) -> None:
        while len({version for _, version in watched.answers}) < 2:
            attempt_id = f"watched-{len(watched.answers)}-{task_id[-3:]}"
            sampling = SamplingParams(max_tokens=4)
            attempts.append(await play_episode(harness, attempt_id, task_id, lake.prompts.solver, sampling))

    await asyncio.gather(*(one_after_another(task.task_id) for task in tasks))
    return attempts


async def swap(loop: Loop, policy: PolicyClient, llama: Path) -> None:
    """While episodes of two evaluations run: each of them finishes on the model that it began with."""
    env = EnvClient(Endpoint(loop.env.address))
    trainer = loop.client()
    watched = Watched(policy)
    before = await policy.info()
    playing = asyncio.create_task(play(env, watched, before))
    settings = EvaluationSettings(samples=2, top_k=0)
    evaluating = asyncio.create_task(trainer.evaluate(LAKE, settings, max_tokens=4))
    async with asyncio.timeout(60):
        while len(watched.sessions) < 40:  # noqa: ASYNC110 - other tasks fill it
            await asyncio.sleep(0.01)
    command = ["policy", "load", "actor", "--model", str(llama), "--policy-address", loop.policy.address]
    loaded = await asyncio.to_thread(CliRunner().invoke, app, command)
    assert loaded.exit_code == 0, loaded.output + str(loaded.exception)
    attempts = await playing
    result, version = await evaluating
    await env.close()
    await trainer.close()

    after = await policy.info()
    assert (before.model, after.model) == ("embedded", "llama") and before.fingerprint != after.fingerprint
    assert after.policy_version == before.policy_version + 1 and after.vocabulary_size != before.vocabulary_size
    assert [attempt.error for attempt in attempts if not attempt.outcome.has_reward] == []
    assert sorted(map(len, watched.sessions.values())) == [1] * len(attempts), "no episode was answered by both"
    answers = [version for _, version in watched.answers]
    assert set(answers) == {before.policy_version, after.policy_version}
    late = answers[answers.index(after.policy_version) :]
    assert before.policy_version in late, "the old model went on while the new one served"
    assert (result.excluded, result.attempts, version) == (0, 200, before.policy_version)


def weights_of(loop: Loop, run_id: str, version: int, fingerprint: str) -> PublishedWeights:
    """What a run published last, to be published again."""
    path = max((loop.folder / "weights").glob(f"{run_id}-v*.safetensors"))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return PublishedWeights(version, WeightsKind.FULL, path.resolve().as_uri(), sha256, fingerprint)


def pids(loop: Loop) -> dict[str, int | None]:
    processes = {name: getattr(loop, name).process for name in ("env", "policy", "memory", "trainer")}
    return {name: process.pid for name, process in processes.items() if process.poll() is None}


def changed(one: Any, other: Any, path: str = "") -> set[str]:
    """Names of the settings in which two runs differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {found for name in one for found in changed(one[name], other[name], f"{path}.{name}".lstrip("."))}
    return set() if one == other else {path}


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_a_llama_takes_the_place_of_a_qwen_and_is_trained(services: ServiceProcesses, tmp_path: Path) -> None:
    llama = write_llama_model(tmp_path / "models" / "llama")
    loop = Loop.start(
        services,
        tmp_path,
        env={"environments": ENVIRONMENTS},
        policy={"session_idle_seconds": 5, "state_folder": tmp_path / "state"},
    )
    started = pids(loop)
    assert len(started) == 4
    policy = PolicyClient(Endpoint(loop.policy.address))
    assert (await loop.train("qwen", SETTINGS)).step == 2
    qwen = await policy.info()

    await swap(loop, policy, llama)

    foreign = weights_of(loop, "qwen", (await policy.info()).policy_version + 1, qwen.fingerprint)
    with pytest.raises(DomainError) as caught:
        await policy.update_weights(foreign)
    assert caught.value.reason is Reason.MODEL_MISMATCH
    await the_old_settings_are_refused(loop)

    settings = SETTINGS.model_copy(update={"model": SETTINGS.model.model_copy(update={"source": str(llama)})})
    assert changed(SETTINGS.model_dump(), settings.model_dump()) == {"model.source"}
    await the_llama_is_trained(loop, policy, llama, settings)

    async with asyncio.timeout(60):
        while (await policy.info()).draining_models:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.5)
    assert pids(loop) == started, "nothing was restarted"
    await policy.close()


async def the_old_settings_are_refused(loop: Loop) -> None:
    client = loop.client()
    await client.start("qwen-again", SETTINGS)
    await client.close()
    error = await loop.failure("qwen-again")
    assert "MODEL_MISMATCH" in error and "serves llama, and this run trains embedded" in error


async def the_llama_is_trained(loop: Loop, policy: PolicyClient, llama: Path, settings: RunSettings) -> None:
    before = await policy.info()
    assert (await loop.train("llama", settings)).step == 2
    after = await policy.info()
    assert after.fingerprint == before.fingerprint and after.policy_version == before.policy_version + 3
    original = load_file(llama / "model.safetensors")
    trained = loop.weights("llama", 2)
    assert original.keys() == trained.keys()
    assert all((original[name] != trained[name]).any() for name in original)
    for metrics in await loop.metrics("llama"):
        assert all(map(math.isfinite, metrics.values()))
        assert metrics["grad_norm"] > 0 and metrics["canary_difference"] < 1e-3
        assert metrics["excluded"] == 0
    assert any(chain.target("distilled") for chain in loop.experiences("llama"))
