"""A real SGLang behind the backend itself, without a policy service: see sglang_servers.py for where it comes from."""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from mulligan import models
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import SamplingParams, WeightsKind
from mulligan.policy.backend import Ask, Backend, Replica, Sampled, WeightsFile
from mulligan.policy.backends.sglang import Settings as SglangSettings
from mulligan.policy.backends.sglang import open as open_backend
from mulligan.policy.backends.sglang.backend import SglangBackend
from mulligan.testing.sglang_servers import CPU_ENVIRONMENT, CPU_FLAGS
from mulligan.testing.weights import load, plain_log_probs
from tests.support.found import sglang_address, sglang_variable
from tests.support.settings import model_settings
from tests.support.waiting import until

MODEL = models.EMBEDDED
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROMPT = list(range(20, 60))
START_SECONDS = 400  # on a machine that does something else, too


def launching(count: int = 1, **changes: Any) -> SglangSettings:
    """Settings that launch servers on the CPU."""
    python = sglang_variable("MULLIGAN_TEST_SGLANG_PYTHON")
    plain = {"launch": count, "python": python, "flags": CPU_FLAGS, "environment": CPU_ENVIRONMENT}
    return SglangSettings(**(plain | changes))


@asynccontextmanager
async def opened(folder: Path, sglang: SglangSettings | None = None, **settings: Any) -> AsyncIterator[SglangBackend]:
    """A backend over the server that runs, unless told otherwise."""
    chosen = sglang or SglangSettings(servers=(sglang_address(),), probe_seconds=0.2)
    plain = {"backend": "sglang", "model": str(MODEL), "sglang": chosen}
    backend = await open_backend(model_settings(**(plain | settings)), folder / "engine", 0)
    assert isinstance(backend, SglangBackend)
    try:
        yield backend
    finally:
        await backend.close()


def ask(prompt: Sequence[int] = PROMPT, *, adapter: str = "", session_id: str = "", **sampling: Any) -> Ask:
    return Ask(list(prompt), SamplingParams(**({"max_tokens": 24} | sampling)), adapter=adapter, session_id=session_id)


async def streamed(backend: Backend, request: Ask) -> Sampled:
    """A stream, put together."""
    parts = [part async for part in backend.stream(request)]
    assert [part.stop_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    return Sampled(
        tuple(token for part in parts for token in part.token_ids),
        tuple(value for part in parts for value in part.log_probs),
        parts[-1].stop_reason,
        tuple(span for part in parts for span in part.policy_versions),
    )


def expected(model: Any, request: Ask, sampled: Sampled) -> list[float]:
    """The log-probabilities of what was sampled, by transformers."""
    ids = [*request.token_ids, *sampled.token_ids]
    return plain_log_probs(model, ids, request.sampling.temperature or 1.0)[len(request.token_ids) - 1 :]


def assert_by_version(references: dict[int, Any], request: Ask, sampled: Sampled) -> None:
    """Every token has the log-probability that the weights give which it is said to come from."""
    begin = 0
    assert sum(span.token_count for span in sampled.policy_versions) == len(sampled.token_ids)
    for span in sampled.policy_versions:
        end = begin + span.token_count
        values = expected(references[span.policy_version], request, sampled)[begin:end]
        assert list(sampled.log_probs[begin:end]) == pytest.approx(values, abs=1e-4)
        begin = end


def changed(seed: int, scale: float = 0.02) -> Any:
    """The embedded model with other weights."""
    model = load(MODEL)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def full(folder: Path, model: Any, version: int, **changes: torch.Tensor | None) -> WeightsFile:
    """A file of its weights. `changes` replaces tensors by name, with __ for dots; None leaves one out."""
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, tensor in changes.items():
        del tensors[name.replace("__", ".")]
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    path = folder / f"full-{version}.safetensors"
    save_file(tensors, path)
    return WeightsFile(path, WeightsKind.FULL, version, _sha256(path))


def lora(folder: Path, version: int, targets: Sequence[str], **settings: Any) -> tuple[Any, WeightsFile]:
    """A model with an adapter that changes it, and the adapter's files."""
    torch.manual_seed(version)
    plain: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(targets), "task_type": "CAUSAL_LM"}
    config = LoraConfig(**(plain | settings))
    tuned = get_peft_model(copy.deepcopy(load(MODEL)), config)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    path = folder / f"lora-{version}"
    tuned.save_pretrained(str(path))
    return tuned.eval(), WeightsFile(path, WeightsKind.LORA, version, _sha256(path / "adapter_model.safetensors"))


def admission(references: dict[int, Any], admitted: list[tuple[str, int]]) -> Any:
    """Compares log-probabilities as a canary does, and notes who was admitted with which version."""

    async def admit(replica: Replica, weights: WeightsFile) -> None:
        scored = await replica.score([PROMPT], 1.0)
        values = plain_log_probs(references[weights.policy_version], PROMPT)
        if list(scored.log_probs[0]) != pytest.approx(values, abs=1e-4):
            raise DomainError(Reason.CANARY_FAILED, f"version {weights.policy_version} is not what was trained")
        admitted.append((replica.info.address, weights.policy_version))

    return admit


class Load:
    """Callers that ask until they are told to stop, each with prompts of its own, some as streams. `pause` is what they
    wait between two requests, in seconds."""

    def __init__(self, backend: SglangBackend, callers: int = 4, pause: float = 0.0):
        self.answers: list[tuple[Ask, Sampled]] = []
        self._backend = backend
        self._pause = pause
        self._running = True
        self._tasks = [asyncio.create_task(self._call(number)) for number in range(callers)]

    async def _call(self, number: int) -> None:
        count = 0
        while self._running:
            request = ask(list(range(20, 40 + number + count % 5)), temperature=2.5, max_tokens=30)
            call = streamed(self._backend, request) if number % 3 == 0 else self._backend.generate(request)
            self.answers.append((request, await call))
            await asyncio.sleep(self._pause)
            count += 1

    async def more(self, count: int = 4) -> None:
        before = len(self.answers)
        await until(lambda: len(self.answers) >= before + count or any(task.done() for task in self._tasks))

    async def stop(self) -> None:
        self._running = False
        await asyncio.gather(*self._tasks)


async def loaded_adapters() -> set[str]:
    """Those that the server that runs has."""
    async with aiohttp.ClientSession() as session, session.get(f"{sglang_address()}/v1/models") as response:
        return {card["id"] for card in (await response.json())["data"] if card.get("parent")}


async def control(path: str, **body: Any) -> dict[str, Any]:
    """What somebody else does to the server that runs."""
    async with aiohttp.ClientSession() as session, session.post(f"{sglang_address()}{path}", json=body) as response:
        assert response.status == 200, await response.text()
        found: dict[str, Any] = await response.json() if response.content_type == "application/json" else {}
        return found


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
