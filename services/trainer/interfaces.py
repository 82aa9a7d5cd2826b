"""The four protocols that the algorithm is written against: environment, policy, memory, learner.

`__main__` passes gRPC clients; tests and the in-process loop pass plain objects. Implementations raise `DomainError`,
`CallFailed` and `ServiceUnavailable` of `mulligan.common.errors` and nothing else for what can go wrong outside.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from mulligan.common.inference import (
    CallOptions,
    Completion,
    PolicyInfo,
    PolicyVersion,
    Prompt,
    PublishedWeights,
    SamplingParams,
    WeightsKind,
)
from mulligan.common.types import (
    EnvironmentInfo,
    EpisodeStep,
    Provenance,
    RetrievalStrategy,
    Split,
    StoredReflection,
    TaskInfo,
)
from mulligan.trainer.data import Datum, ModelLimits
from mulligan.trainer.settings import LossSettings


class EpisodeHandle(Protocol):
    """A started episode. It counts its own steps."""

    @property
    def episode_id(self) -> str: ...

    @property
    def observation(self) -> str:
        """The first one."""

    async def step(self, action: str) -> EpisodeStep: ...

    def kept_alive(self) -> AbstractAsyncContextManager[None]:
        """Within the block the episode does not expire, however long no step is made."""

    async def end(self) -> None: ...


class EnvironmentPort(Protocol):
    async def describe(self, environment: str) -> EnvironmentInfo:
        """Raises DomainError UNKNOWN_ENVIRONMENT."""

    async def list_tasks(self, environment: str, split: Split, limit: int) -> list[TaskInfo]:
        """The first `limit` tasks; 0 means all."""

    async def start(self, environment: str, task_id: str, episode_id: str) -> EpisodeHandle: ...


class SamplingClient(Protocol):
    """What a harness asks."""

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = CallOptions()
    ) -> Completion: ...

    async def tokenize(self, prompt: Prompt | str, options: CallOptions = CallOptions()) -> tuple[int, ...]:
        """What `generate` would report as prompt_token_ids; a string is encoded without template."""


class PolicyPort(SamplingClient, Protocol):
    """All policies of a service. A name that is empty is the default policy's."""

    async def info(self, policy: str = "") -> PolicyInfo:
        """Raises DomainError UNKNOWN_POLICY."""

    async def versions(self, policy: str = "") -> Sequence[PolicyVersion]:
        """Newest first; the last ones, where there are many."""

    async def update_weights(self, weights: PublishedWeights, policy: str = "") -> float | None:
        """The difference that the canary found; None without one."""


# Brings weights to a policy service that cannot read them where they are: (path of a safetensors file or of the folder
# of an adapter, its kind, the file's SHA-256, the policy's name) → the URI for one `update_weights`.
Upload = Callable[[Path, WeightsKind, str, str], Awaitable[str]]


class MemoryPort(Protocol):
    async def snapshot(self, scope: str) -> int:
        """The scope's version."""

    async def query(
        self, scope: str, environment: str, strategy: RetrievalStrategy, limit: int, as_of_version: int | None = None
    ) -> tuple[StoredReflection, ...]: ...

    async def add(self, request_id: str, scope: str, text: str, provenance: Provenance) -> str:
        """The reflection's id. Repeating a request id changes nothing."""


class LearnerPort(Protocol):
    @property
    def fingerprint(self) -> str:
        """Of the model that is trained."""

    @property
    def limits(self) -> ModelLimits:
        """Of the model that is trained."""

    @property
    def adapted_layers(self) -> tuple[str, ...]:
        """With LoRA, last parts of the names of the layers that have an adapter, each once. Empty without, and of a
        server that does not tell."""

    async def forward(self, data: Sequence[Datum]) -> list[tuple[float, ...]]:
        """Log-probabilities of each datum's trained tokens under the present weights."""

    async def forward_backward(self, data: Sequence[Datum], loss: LossSettings) -> dict[str, float]: ...

    async def optim_step(self) -> dict[str, float]: ...

    async def save_checkpoint(self, name: str) -> None: ...

    async def load_checkpoint(self, name: str) -> None: ...

    async def publish_weights(self, policy_version: int) -> PublishedWeights: ...

    async def close(self) -> None:
        """Gives the learner back; what was not saved is lost."""
