"""A backend that answers as a test tells it to, for what the policy service does around any engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import Code, DomainError, Reason
from mulligan.common.inference import (
    CallOptions,
    Feature,
    Message,
    ReplicaInfo,
    SamplingParams,
    StopReason,
    VersionSpan,
)
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy.backend import Admission, Ask, ModelInfo, Sampled, Scored, WeightsFile
from mulligan.policy.chat import Chat
from mulligan.policy.client import PolicyClient
from mulligan.policy.literals import ControlTokens
from mulligan.policy.model_settings import ModelSettings
from tests.support.policy import Serving, serving

WORDS = ("up", "down", "left", "right")


class ScriptedBackend:
    """`asks` are those that arrived, `ended` those that were answered, failed or were cancelled.

    Each sample is `words`, one per part, ids from 0. While `go_on` is clear, only the first `ahead` words come; while
    `judge` is, nothing is scored; while `may_close` is, `close` waits. Weights change under way, and tokens tell of
    which they are.
    """

    def __init__(self, settings: ModelSettings, first_version: int = 0, **info: Any):
        plain: dict[str, Any] = {
            "model": settings.model,
            "fingerprint": settings.model,
            "context_length": settings.context_length or 32,
            "vocabulary_size": 16,
            "end_of_turn_token_ids": (15,),
            "rewrites_history": False,
            "deterministic": True,
            "dtype": "float32",
            "features": frozenset(Feature) - {Feature.LORA_WEIGHTS},
            "adapters": tuple(settings.adapters),
        }
        self.model = ModelInfo(**(plain | info))
        self.policy_version = first_version
        self.compute_seconds = 1.5
        self.replicas = (self,)
        self.info = ReplicaInfo("", True)
        self.asks: list[Ask] = []
        self.ended: list[Ask] = []
        self.failures: list[Exception] = []
        self.words: tuple[str, ...] = WORDS
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.ahead = 0
        self.judge = asyncio.Event()
        self.judge.set()
        self.may_close = asyncio.Event()
        self.may_close.set()
        self.closings = 0  # calls of `close`
        self.closed = False
        self.mark = ""  # the marked text begins with it

    @property
    def chat(self) -> Chat | None:
        return None if Feature.TOKEN_IDS not in self.model.features else _WordChat()

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(self.words[index] if index < len(self.words) else f"<{index}>" for index in token_ids)

    def decode_marked(self, token_ids: Sequence[int], text: str) -> str:
        return self.mark + text

    async def generate(self, ask: Ask) -> Sampled:
        parts = [part async for part in self.stream(ask)]
        tokens = sum((part.token_ids for part in parts), ())
        spans = [VersionSpan(span.policy_version, 1) for part in parts for span in part.policy_versions]
        text = "".join(part.text for part in parts)
        return Sampled(tokens, (-0.5,) * len(tokens), StopReason.MAX_TOKENS, tuple(spans), text)

    async def stream(self, ask: Ask) -> AsyncIterator[Sampled]:
        self.asks.append(ask)
        try:
            for index, word in enumerate(self.words):
                if index >= self.ahead:
                    await self.go_on.wait()
                await asyncio.sleep(0)
                if self.failures:
                    raise self.failures.pop(0)
                last = StopReason.MAX_TOKENS if index == len(self.words) - 1 else None
                span = (VersionSpan(self.policy_version, 1),)
                if Feature.TOKEN_IDS in self.model.features:
                    yield Sampled((index,), (-0.5,), last, span)
                else:
                    yield Sampled((), (), last, span, word)
        finally:
            self.ended.append(ask)

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float, adapter: str = "") -> Scored:
        """-1 for each token."""
        await self.judge.wait()
        return Scored(tuple((-1.0,) * (len(row) - 1) for row in sequences), self.policy_version)

    async def checksum(self) -> str:
        return ""

    async def update_weights(self, weights: WeightsFile, admit: Admission) -> None:
        before = self.policy_version
        self.policy_version = weights.policy_version
        try:
            await admit(self, weights)
        except BaseException:
            self.policy_version = before
            raise

    async def release_memory(self) -> None:
        return None

    async def resume_memory(self) -> None:
        return None

    async def close(self) -> None:
        self.closings += 1
        await self.may_close.wait()
        self.closed = True


class _NoEncoder:
    controls = ControlTokens([], lambda text: ([], []))
    longest_token = 8

    def encode(self, text: str, /) -> list[int]:
        return []


class _WordChat(Chat):
    """A token for each message, and one for the header of the assistant's turn."""

    def __init__(self) -> None:
        super().__init__(None, _NoEncoder(), ())
        self.has_tools = True

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = (), longest: int = 0) -> tuple[int, ...]:
        return (1,) * (len(messages) + len(tools) + 1)

    def extend(self, continuation: Any, longest: int = 0) -> tuple[int, ...]:
        return (2,) * (len(continuation.messages) + 1)


class Opened:
    """`create` for `serving`: scripted backends by the names of their models, those that were opened first first.

    A model whose name begins with `bad` is refused. `info` changes what all say of themselves.
    """

    def __init__(self, **info: Any):
        self.info = info
        self.backends: list[ScriptedBackend] = []
        self.folders: list[Path] = []
        self.go_on = asyncio.Event()  # while it is clear, nothing is opened
        self.go_on.set()
        self.asked: list[str] = []  # the models that were to be opened

    def __getitem__(self, model: str) -> ScriptedBackend:
        return [backend for backend in self.backends if backend.model.model == model][-1]

    async def create(self, settings: ModelSettings, folder: Path, first_version: int) -> ScriptedBackend:
        self.asked.append(settings.model)
        await self.go_on.wait()
        if settings.model.startswith("bad"):
            raise UnsupportedModel(f"{settings.model} is bad")
        backend = ScriptedBackend(settings, first_version, **self.info)
        self.backends.append(backend)
        self.folders.append(folder)
        assert os.listdir(folder) == []
        return backend


@dataclass
class Running:
    served: Serving
    opened: Opened

    @property
    def client(self) -> PolicyClient:
        return self.served.client

    async def serves(self, model: str, version: int, policy: str = "") -> None:
        info = await self.client.info(policy)
        assert (info.model, info.policy_version) == (model, version)
        completion = await self.client.generate([1, 2, 3], SamplingParams(), CallOptions(policy=policy))
        assert {span.policy_version for span in completion.policy_versions} == {version}
        assert self.opened[model].asks


@asynccontextmanager
async def started(opened: Opened | None = None, **settings: Any) -> AsyncIterator[Running]:
    opened = opened or Opened()
    plain: dict[str, Any] = {"model": "one", "create": opened.create}
    async with serving(**(plain | settings)) as served:
        yield Running(served, opened)


async def refused(call: Awaitable[object], reason: Reason, code: Code = Code.INVALID_ARGUMENT) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await call
    assert (caught.value.reason, caught.value.code) == (reason, code), caught.value
    return caught.value
