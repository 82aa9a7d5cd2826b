"""SGLang servers that are killed under load, again and again: no caller sees an error or an answer of old weights."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import torch

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import (
    CallOptions,
    CanaryProbe,
    PublishedWeights,
    ReplicaInfo,
    SamplingParams,
    VersionSpan,
)
from mulligan.models import EMBEDDED
from mulligan.policy.client import PolicyClient
from mulligan.testing.processes import ServiceProcesses
from mulligan.testing.sglang_servers import LAUNCH_SECONDS, launch_settings, processes_of, python_of_sglang, runs
from mulligan.testing.weights import full_weights, load, plain_log_probs
from proof import CaseUnavailable

KILLS = 6
CALLERS = 12
PROMPTS = 40
CHECKED = 1500  # answers that are compared with a forward pass
RETURN_SECONDS = 300.0
TOLERANCE = 1e-4
_STEP = 0.003  # of an update, in each weight


@dataclass(frozen=True, slots=True)
class RecordedAnswer:
    """`least` is the version that served when the call was made; `begin` is the index of the first scored token."""

    least: int
    tokens: list[int]
    begin: int
    log_probs: tuple[float, ...]
    spans: tuple[VersionSpan, ...]


@dataclass
class Traffic:
    """Callers of Generate, StreamGenerate and Score. They never retry."""

    client: PolicyClient
    chance: random.Random
    version: int = 0
    answers: list[RecordedAnswer] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    slowest: float = 0.0
    over: bool = False

    async def call(self, number: int, prompts: list[list[int]]) -> None:
        kind = (self._generate, self._generate, self._stream, self._score)[number % 4]
        while not self.over:
            least = self.version
            start = time.monotonic()
            try:
                self.answers.append(await kind(self.chance.choice(prompts), least))
            except Exception as error:  # noqa: BLE001 - whatever a caller sees is the result
                self.errors.append(f"{kind.__name__}: {error!r}")
            self.slowest = max(self.slowest, time.monotonic() - start)
            await asyncio.sleep(self.chance.uniform(0, 0.3))

    async def _generate(self, prompt: list[int], least: int) -> RecordedAnswer:
        sampling = SamplingParams(max_tokens=self.chance.randint(1, 80))
        found = await self.client.generate(prompt, sampling, CallOptions(min_policy_version=least))
        return RecordedAnswer(least, [*prompt, *found.token_ids], len(prompt), found.log_probs, found.policy_versions)

    async def _stream(self, prompt: list[int], least: int) -> RecordedAnswer:
        tokens = list(prompt)
        log_probs: list[float] = []
        spans: list[VersionSpan] = []
        finished = False
        sampling = SamplingParams(max_tokens=self.chance.randint(1, 80))
        async for part in self.client.stream(prompt, sampling, 1, CallOptions(min_policy_version=least)):
            tokens += part.token_ids
            log_probs += part.log_probs
            spans += part.policy_versions
            finished = part.stop_reason is not None
        assert finished, "the stream ended in the middle"
        return RecordedAnswer(least, tokens, len(prompt), tuple(log_probs), tuple(spans))

    async def _score(self, prompt: list[int], least: int) -> RecordedAnswer:
        found = await self.client.score([prompt], 1.0, CallOptions(min_policy_version=least))
        span = VersionSpan(found.policy_version, len(prompt) - 1)
        return RecordedAnswer(least, list(prompt), 1, tuple(found.log_probs[0]), (span,))


class VersionedWeights:
    """The weights of each version, published as by a trainer."""

    def __init__(self, folder: Path, fingerprint: str, seed: int):
        self._folder = folder
        self._fingerprint = fingerprint
        self._model = load(EMBEDDED)
        self._generator = torch.Generator().manual_seed(seed)
        self.states = {0: self._state()}

    def following(self, version: int) -> PublishedWeights:
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.add_(_STEP * torch.randn(parameter.shape, generator=self._generator))
        self.states[version] = self._state()
        probe = tuple(range(5, 60))
        canary = (CanaryProbe(probe, tuple(plain_log_probs(self._model, probe))),)
        path = self._folder / f"{version}.safetensors"
        return full_weights(path, self.states[version], version, self._fingerprint, canary=canary)

    def log_probs(self, version: int, tokens: list[int]) -> list[float]:
        self._model.load_state_dict(self.states[version])
        return plain_log_probs(self._model, tokens)

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self._model.state_dict().items()}


def kill_servers(seed: int, folder: Path) -> dict[str, Any]:
    """Kills one of two servers at random moments, KILLS times, also during updates of weights. Before the next kill it
    waits until the server is back."""
    if not python_of_sglang():
        raise CaseUnavailable("MULLIGAN_TEST_SGLANG_PYTHON: the interpreter of an environment with SGLang")
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "weights").mkdir(parents=True)
    services = ServiceProcesses(folder)
    try:
        process = services.start(
            "policy",
            start_seconds=LAUNCH_SECONDS,
            backend="sglang",
            model="embedded",
            sglang=launch_settings(2),
            weights_folder=folder / "weights",
            state_folder=folder / "state",
        )
        result = asyncio.run(_run(process.address, folder, seed))
        assert process.stop() == 0, process.log
    finally:
        services.end()
    return result


async def _run(address: str, folder: Path, seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    client = PolicyClient(Endpoint(address, outage_seconds=0), timeout=300)
    weights = VersionedWeights(folder / "weights", (await client.info()).fingerprint, seed)
    traffic = Traffic(client, random.Random(seed + 1))
    prompts = [[chance.randrange(5, 319) for _ in range(chance.randint(4, 40))] for _ in range(PROMPTS)]
    callers = [asyncio.create_task(traffic.call(number, prompts)) for number in range(CALLERS)]
    start = time.monotonic()
    counts = {"before_an_update": 0, "during_an_update": 0, "after_an_update": 0}
    returned = []
    repeated = 0
    try:
        for _ in range(KILLS):
            await asyncio.sleep(chance.uniform(0.5, 3.0))
            moment = chance.choice(list(counts))
            counts[moment] += 1
            killed, again = await _kill_and_update(client, traffic, weights, moment, chance)
            repeated += again
            returned.append(await _back(client, weights, traffic.version, killed))
    finally:
        traffic.over = True
        await asyncio.gather(*callers)
    seconds = round(time.monotonic() - start)
    await client.close()
    found = await asyncio.to_thread(_verdict, traffic, weights)
    result = {
        "kills": counts,
        "seconds_under_fire": seconds,
        "updates": traffic.version,
        "updates_repeated": repeated,
        "seconds_until_back": {"median": sorted(returned)[len(returned) // 2], "greatest": max(returned)},
        "slowest_call_seconds": round(traffic.slowest, 2),
        **found,
    }
    assert not traffic.errors and not found["stale"] and found["answers"] > 20 * KILLS, (result, traffic.errors[:5])
    assert found["greatest_difference"] <= TOLERANCE, result
    return result


async def _kill_and_update(
    client: PolicyClient, traffic: Traffic, weights: VersionedWeights, moment: str, chance: random.Random
) -> tuple[int, int]:
    """Returns the process id of the killed server, and how often the update was repeated."""
    victim = chance.choice((await client.info()).replicas)
    version = traffic.version + 1
    published = await asyncio.to_thread(weights.following, version)
    killed = _kill(victim, chance) if moment == "before_an_update" else 0
    await asyncio.sleep(chance.uniform(0, 2))
    update = asyncio.create_task(_update(client, published))
    if moment == "during_an_update":
        await asyncio.sleep(chance.uniform(0, 0.3))
        killed = _kill(victim, chance)
    repeated = await update
    traffic.version = version
    if moment == "after_an_update":
        await asyncio.sleep(chance.uniform(0, 0.3))
        killed = _kill(victim, chance)
    return killed, repeated


async def _update(client: PolicyClient, published: PublishedWeights) -> int:
    """Updates as a trainer does: again, if engines were lost. Returns the number of repetitions."""
    repeated = 0
    while True:
        try:
            await client.update_weights(published)
        except DomainError as error:
            if error.reason is not Reason.ENGINE_UNAVAILABLE:
                raise
            repeated += 1
            await asyncio.sleep(0.2)
        else:
            return repeated


def _kill(victim: ReplicaInfo, chance: random.Random) -> int:
    """Kills the server's main process, or sometimes its scheduler or detokenizer. Returns the main process id."""
    group = processes_of(victim.address)
    assert group, f"{victim.address} does not run"
    os.kill(group[0] if chance.random() < 0.7 else chance.choice(group), signal.SIGKILL)
    return group[0]


async def _back(client: PolicyClient, weights: VersionedWeights, version: int, killed: int) -> float:
    """Waits until all servers serve again, and compares their log-probabilities. Returns the seconds."""
    start = time.monotonic()
    replicas: Sequence[ReplicaInfo] = ()
    while runs(killed) or not replicas or not all(replica.serving for replica in replicas):
        assert time.monotonic() < start + RETURN_SECONDS, replicas
        await asyncio.sleep(0.25)
        replicas = (await client.info()).replicas
    tokens = list(range(9, 60))
    expected = weights.log_probs(version, tokens)
    async with aiohttp.ClientSession() as session:
        for replica in replicas:
            body = {"input_ids": tokens, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
            async with session.post(f"{replica.address}/generate", json=body | {"logprob_start_len": 0}) as response:
                answer = await response.json()
            found = [one[0] for one in answer["meta_info"]["input_token_logprobs"][1:]]
            assert _difference(found, expected) <= TOLERANCE, (replica, version, answer["meta_info"])
    return round(time.monotonic() - start, 1)


def _verdict(traffic: Traffic, weights: VersionedWeights) -> dict[str, Any]:
    stale = [one for one in traffic.answers if any(span.policy_version < one.least for span in one.spans)]
    step = max(1, len(traffic.answers) // CHECKED)
    differences = [0.0]
    mixed = 0
    for answer in traffic.answers[::step]:
        mixed += len(answer.spans) > 1 and len({span.policy_version for span in answer.spans}) > 1
        place = 0
        for span in answer.spans:
            end = place + span.token_count
            tokens = answer.tokens[: answer.begin + end]
            expected = weights.log_probs(span.policy_version, tokens)[answer.begin - 1 + place :]
            differences.append(_difference(answer.log_probs[place:end], expected))
            place = end
        assert place == len(answer.log_probs) == len(answer.tokens) - answer.begin, answer
    return {
        "answers": len(traffic.answers),
        "errors": len(traffic.errors),
        "stale": len(stale),
        "compared_with_a_forward_pass": len(traffic.answers[::step]),
        "of_several_versions": mixed,
        "greatest_difference": max(differences),
    }


def _difference(ours: list[float] | tuple[float, ...], theirs: list[float]) -> float:
    return max((abs(left - right) for left, right in zip(ours, theirs, strict=True)), default=0.0)


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {"sglang-kills-0": partial(kill_servers, 0)}
