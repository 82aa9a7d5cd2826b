"""The backends that the contract suites run against: all with the embedded model, so that one reference fits all.

The SGLang server is real. MULLIGAN_TEST_SGLANG has the address of one that serves models/embedded with LoRA enabled;
the openai backend asks the same server's OpenAI endpoint.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx2
import pytest
from transformers import AutoTokenizer

from mulligan.common.errors import Code, DomainError, Reason
from mulligan.common.inference import CallOptions, Feature, Message, PolicyInfo, Role, SamplingParams
from mulligan.models import EMBEDDED
from mulligan.policy.client import PolicyClient
from mulligan.testing.weights import load
from tests.support.found import sglang_address
from tests.support.policy import serving

BOARD = (Message(Role.SYSTEM, "play"), Message(Role.USER, "A B C\nD E F"))
# The model answers with a legend of some forty tokens.
TRACE = (Message(Role.SYSTEM, "explain"), Message(Role.USER, "A B\nC D\nUp\nB A\nC D\nfell into hole\nnothing"))
# The model goes on for 517 tokens when it takes the likeliest each time.
LONG_PROMPT = [259] * 20
LONG_COUNT = 517

_LOCAL = frozenset(
    {
        Feature.TOKEN_IDS,
        Feature.LOG_PROBS,
        Feature.SCORE,
        Feature.SCORE_TEMPERATURE,
        Feature.STREAM,
        Feature.TOP_K,
        Feature.STOP_TOKEN_IDS,
        Feature.FULL_WEIGHTS,
        Feature.LORA_WEIGHTS,
    }
)
# What each can do with this model: the suite must notice when one can do less than it did. The model's chat template
# shows no tools, and its tokenizer puts spaces between words only when it decodes, which the transformers backend takes
# no constraints on. SGLang has seeds with --enable-deterministic-inference alone, which needs a GPU.
FEATURES = {
    "batched": _LOCAL | {Feature.SEED, Feature.PRIORITY},
    "deterministic": _LOCAL | {Feature.SEED, Feature.PRIORITY},
    "sglang": _LOCAL | {Feature.REGEX, Feature.JSON_SCHEMA},
    "openai": frozenset({Feature.STREAM, Feature.JSON_SCHEMA}),
}
BACKENDS = tuple(FEATURES)
WITH_WEIGHTS = ("batched", "sglang")


@dataclass
class Running:
    """A policy service in this process. `engine_load` counts the requests that the engine itself works on."""

    name: str
    address: str
    client: PolicyClient
    info: PolicyInfo
    engine_load: Callable[[], Awaitable[int]]

    def offers(self, *features: Feature) -> bool:
        return set(features) <= self.info.features

    async def refuses(self, call: Awaitable[object], field: str, feature: Feature) -> None:
        """What the contract says of an option that needs what the engine lacks."""
        assert feature not in self.info.features
        with pytest.raises(DomainError) as caught:
            await call
        error = caught.value
        assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, Reason.UNSUPPORTED_OPTION), error
        assert error.metadata == {"field": field, "feature": feature.value}


def served_name(address: str) -> str:
    """The name that the server serves under now: the path of its last weights."""
    return str(httpx2.get(f"{address}/v1/models").json()["data"][0]["id"])


def settings_of(name: str) -> dict[str, Any]:
    """Settings of the policy service that differ from their defaults."""
    if name == "sglang":
        return {"backend": "sglang", "model": str(EMBEDDED), "sglang": {"servers": (sglang_address(),)}}
    if name == "openai":
        address = sglang_address()
        endpoint = {"base_url": f"{address}/v1", "without": ("seed", "tools")}
        return {"backend": "openai", "model": served_name(address), "openai": endpoint}
    return {"model": str(EMBEDDED), "slots": 16, "threads": 1, "deterministic": name == "deterministic"}


@asynccontextmanager
async def running(name: str, **changes: Any) -> AsyncIterator[Running]:
    settings = settings_of(name)
    for key, value in changes.items():
        settings[key] = settings[key] | value if isinstance(settings.get(key), dict) else value
    async with serving(**settings) as served:
        info = await served.client.info()

        async def own_load() -> int:
            return sum(replica.in_flight for replica in (await served.client.info()).replicas)

        remote = name in ("sglang", "openai")
        yield Running(name, served.address, served.client, info, _sglang_load if remote else own_load)


async def restore(name: str) -> None:
    """Gives the shared server the weights that its model came with, for the tests that follow."""
    if name != "sglang":
        return
    async with httpx2.AsyncClient(base_url=sglang_address(), timeout=60) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        for adapter in [model["id"] for model in listed if model["parent"] is not None]:
            answer = await client.post("/unload_lora_adapter", json={"lora_name": adapter})
            assert answer.json()["success"], answer.text
        body = {"model_path": str(EMBEDDED), "weight_version": "default", "flush_cache": True}
        answer = await client.post("/update_weights_from_disk", json=body)
        assert answer.json()["success"], answer.text


async def _sglang_load() -> int:
    async with httpx2.AsyncClient() as client:
        answer = await client.get(f"{sglang_address()}/v1/loads")
    return sum(int(load["num_running_reqs"]) + int(load["num_waiting_reqs"]) for load in answer.json()["loads"])


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED)


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text, add_special_tokens=False)
    return ids


def decode(token_ids: Any) -> str:
    return str(tokenizer().decode(list(token_ids), skip_special_tokens=True))


@cache
def reference() -> Any:
    """The same model under transformers' own code."""
    return load(EMBEDDED)


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0} | changes))


def options(**changes: Any) -> CallOptions:
    return CallOptions(**changes)
