"""Ways to call a model: transformers' `generate`, an engine in this process, a service, SGLang's HTTP interface."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import aiohttp
import msgspec
import torch

from benchmarks.policy.load import NEW_TOKENS, EngineAccess, Round, prompts, turns_of
from mulligan.common.inference import CallOptions, CompletionPart, SamplingParams
from mulligan.policy.backend import Ask, Sampled
from mulligan.policy.backends.transformers.backend import TransformersBackend
from mulligan.policy.client import PolicyClient

Rest = Callable[[], Awaitable[None]]
_KEEP_SECONDS = 3.0  # for idle connections; SGLang closes them after 5


def _sampling(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=1.0, max_tokens=tokens)


@torch.inference_mode()
def plain_generate(model: Any, vocabulary: int, callers: int) -> Round:
    """Computes all callers' prompts as one batch."""
    seconds = []
    for _ in range(turns_of(callers)):
        ids = torch.tensor(prompts(callers, vocabulary), device=model.device)
        start = time.perf_counter()
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS, pad_token_id=0
        )
        output.cpu()
        seconds.append(time.perf_counter() - start)
        assert output.shape == (callers, ids.shape[1] + NEW_TOKENS)
    tokens = callers * NEW_TOKENS * len(seconds)
    return Round(tokens / sum(seconds), tuple(one for one in seconds for _ in range(callers)))


def in_process(backend: TransformersBackend) -> EngineAccess:
    async def generate(prompt: list[int], tokens: int) -> int:
        return len((await backend.generate(Ask(prompt, _sampling(tokens)))).token_ids)

    async def first_token(prompt: list[int], tokens: int) -> Rest:
        return await _after_first(backend.stream(Ask(prompt, _sampling(tokens))))

    return EngineAccess(generate, first_token)


def service(client: PolicyClient) -> EngineAccess:
    async def generate(prompt: list[int], tokens: int) -> int:
        return len((await client.generate(prompt, _sampling(tokens))).token_ids)

    async def first_token(prompt: list[int], tokens: int) -> Rest:
        return await _after_first(client.stream(prompt, _sampling(tokens), 1, CallOptions()))

    return EngineAccess(generate, first_token)


async def _after_first(parts: AsyncIterator[Sampled] | AsyncIterator[CompletionPart]) -> Rest:
    async for part in parts:
        if part.token_ids:
            break
    else:
        raise AssertionError("the stream ended without a token")
    return partial(_exhaust, parts)


async def _exhaust(parts: AsyncIterator[Any]) -> None:
    async for _ in parts:
        pass


class SglangHttp:
    """SGLang's native endpoints, called efficiently: token ids, one connection per request in flight, and a fast JSON
    library."""

    def __init__(self, session: aiohttp.ClientSession, address: str):
        self._session = session
        self.address = address.rstrip("/")

    def engine(self) -> EngineAccess:
        return EngineAccess(self._generate, self._first_token)

    async def get(self, path: str) -> Any:
        async with self._session.get(f"{self.address}{path}") as response:
            response.raise_for_status()
            return msgspec.json.decode(await response.read())

    async def post(self, path: str, **body: object) -> Any:
        async with self._session.post(f"{self.address}{path}", json=body) as response:
            response.raise_for_status()
            content = await response.read()
        return msgspec.json.decode(content) if content.startswith((b"{", b"[")) else None

    async def sample(self, prompt: list[int], tokens: int) -> Any:
        """The answer as JSON."""
        async with self._session.post(f"{self.address}/generate", data=_request(prompt, tokens)) as response:
            response.raise_for_status()
            return msgspec.json.decode(await response.read())

    async def _generate(self, prompt: list[int], tokens: int) -> int:
        answer = await self.sample(prompt, tokens)
        assert len(answer["output_ids"]) == len(answer["meta_info"]["output_token_logprobs"])
        return len(answer["output_ids"])

    async def _first_token(self, prompt: list[int], tokens: int) -> Rest:
        body = _request(prompt, tokens, stream=True)
        response = await self._session.post(f"{self.address}/generate", data=body)
        response.raise_for_status()
        await response.content.readuntil(b"\n\n")

        async def rest() -> None:
            await response.read()
            response.release()

        return rest


def new_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS),
        timeout=aiohttp.ClientTimeout(total=600),
        headers={"Content-Type": "application/json"},
    )


def _request(prompt: list[int], tokens: int, *, stream: bool = False) -> bytes:
    params = {"temperature": 1.0, "max_new_tokens": tokens}
    return msgspec.json.encode(
        {"input_ids": prompt, "sampling_params": params, "return_logprob": True, "stream": stream}
    )
