"""A backend that says what it was told last."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NoReturn

from pydantic import Field

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import ReplicaInfo, StopReason, VersionSpan
from mulligan.policy import Admission, Ask, BackendSettings, ModelInfo, ModelSettings, Sampled, Scored, WeightsFile


class Settings(BackendSettings):
    """A voice."""

    greeting: str = Field("", description="Comes before all that it says.")
    loudness: int = Field(1, ge=1, le=3, description="How often it says it.")


class Parrot:
    """One policy, and its only replica. It has no tokens, and offers nothing that is optional."""

    def __init__(self, settings: ModelSettings, first_version: int) -> None:
        self.model = ModelInfo(
            model=settings.model,
            fingerprint="",
            context_length=settings.context_length,
            vocabulary_size=0,
            end_of_turn_token_ids=(),
            rewrites_history=True,
            deterministic=True,
            dtype="",
            features=frozenset(),
        )
        self.policy_version = first_version
        self.info = ReplicaInfo("", True)
        self.replicas = (self,)
        self.chat = None
        self.compute_seconds = 0.0
        self._own = settings.own_as(Settings)

    async def generate(self, ask: Ask) -> Sampled:
        text = self._own.greeting + " ".join([ask.messages[-1].content] * self._own.loudness)
        ends = [text.index(stop) + len(stop) for stop in ask.sampling.stop if stop in text]
        reason = StopReason.STOP_STRING if ends else StopReason.END_OF_TURN
        text = text[: min(ends, default=len(text))]
        return Sampled((), (), reason, (VersionSpan(self.policy_version, 0),), text)

    async def stream(self, ask: Ask) -> AsyncIterator[Sampled]:
        yield await self.generate(ask)

    async def update_weights(self, weights: WeightsFile, admit: Admission) -> None:
        await admit(self, weights)
        self.policy_version = weights.policy_version

    async def checksum(self) -> str:
        return ""

    def encode(self, text: str) -> NoReturn:
        raise _unsupported()

    def decode(self, token_ids: Sequence[int]) -> NoReturn:
        raise _unsupported()

    def decode_marked(self, token_ids: Sequence[int], text: str) -> str:
        return text

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float, adapter: str = "") -> Scored:
        raise _unsupported()

    async def release_memory(self) -> NoReturn:
        raise _unsupported()

    async def resume_memory(self) -> NoReturn:
        raise _unsupported()

    async def close(self) -> None:
        return None


async def open(settings: ModelSettings, folder: Path, first_version: int) -> Parrot:
    return Parrot(settings, first_version)


def _unsupported() -> DomainError:
    return DomainError(Reason.UNSUPPORTED_OPTION, "a parrot repeats words, and can nothing else")
