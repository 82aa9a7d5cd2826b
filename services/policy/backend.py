"""What a policy service needs of a model runtime. A new backend is one file that implements `Backend`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.common.types import PolicyInfo, SamplingParams, StopReason, WeightsKind
from services.policy.chat import Chat


class UnsupportedModel(Exception):
    """A model that this backend cannot serve correctly; the message says why. Raised when it is loaded."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one request sampled, all of it by one version."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    stop_reason: StopReason
    policy_version: int


@dataclass(frozen=True, slots=True)
class Scored:
    """Per sequence one log-probability for each token after the first."""

    log_probs: tuple[tuple[float, ...], ...]
    policy_version: int


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """Weights on disk, below the folder that the settings allow and with the right checksum.

    `path` is a safetensors file, or the folder of a LoRA adapter.
    """

    path: Path
    kind: WeightsKind
    policy_version: int
    sha256: str

    @property
    def safetensors(self) -> Path:
        return self.path / "adapter_model.safetensors" if self.kind is WeightsKind.LORA else self.path


class Backend(Protocol):
    """One model, its tokenizer and its chat template. All calls may be made concurrently on one event loop."""

    @property
    def info(self) -> PolicyInfo: ...

    @property
    def chat(self) -> Chat: ...

    @property
    def serving_sha256(self) -> str | None:
        """Checksum of the weights that serve; None for those the model came with."""

    def encode(self, text: str) -> list[int]:
        """Without special tokens."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Without special tokens."""

    async def generate(self, token_ids: Sequence[int], sampling: SamplingParams) -> Sampled:
        """Samples after a valid prompt: not empty, in vocabulary, shorter than the context.

        Raises DomainError QUEUE_FULL. Cancelling the task stops the generation.
        """

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float) -> Scored:
        """Log-probabilities of softmax(logits / temperature) of valid sequences. Raises DomainError QUEUE_FULL."""

    async def update_weights(self, weights: WeightsFile) -> None:
        """Serves these weights from now on; running requests finish on the old ones first.

        Raises DomainError MODEL_MISMATCH or WEIGHTS_NOT_FOUND, and then serves what it served before.
        """

    async def close(self) -> None: ...
