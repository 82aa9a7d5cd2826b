"""The four protocols that the algorithm uses: environment, policy, memory, learner.

The trainer passes gRPC clients; tests and the in-process loop pass plain objects. All failures outside this process are
raised as `DomainError`, `CallFailed` or `ServiceUnavailable` of `mulligan.common.errors`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
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
from mulligan.common.reflections import Addition, Labels, Provenance, ReflectionQuery, Retrieved, Trial, UseOutcome
from mulligan.common.types import EnvironmentInfo, EpisodeStep, Split, TaskInfo
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
        """The episode does not expire within the block, however long it takes."""

    async def fork(self, new_episode_id: str) -> EpisodeHandle:
        """A copy of the episode in its present state. Raises DomainError FORK_UNSUPPORTED if `can_fork` is false."""

    async def end(self) -> None: ...


class EnvironmentPort(Protocol):
    async def describe(self, environment: str) -> EnvironmentInfo:
        """Raises DomainError UNKNOWN_ENVIRONMENT, whose message has the nearest right name: the trainer knows none."""

    async def list_tasks(self, environment: str, split: Split, limit: int) -> list[TaskInfo]:
        """The first `limit` tasks; 0 means all."""

    async def start(self, environment: str, task_id: str, episode_id: str) -> EpisodeHandle: ...


class SamplingClient(Protocol):
    """Samples from one policy and tokenizes for it."""

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = CallOptions()
    ) -> Completion: ...

    async def tokenize(self, prompt: Prompt | str, options: CallOptions = CallOptions()) -> tuple[int, ...]:
        """The prompt_token_ids that `generate` would report. A string is encoded without the chat template."""


class PolicyPort(SamplingClient, Protocol):
    """All policies of a service. An empty name means the default policy."""

    async def info(self, policy: str = "") -> PolicyInfo:
        """Raises DomainError UNKNOWN_POLICY, whose message has the nearest right name."""

    async def versions(self, policy: str = "") -> Sequence[PolicyVersion]:
        """Newest first. A service with many versions gives the newest only."""

    async def update_weights(self, weights: PublishedWeights, policy: str = "") -> float | None:
        """The largest log-probability difference in the weight check; None if none ran."""


# Uploads weights to a policy service that cannot read the trainer's files: (path of a safetensors file or of an
# adapter's folder, kind, SHA-256 of the file, name of the policy) → the URI for `update_weights`.
Upload = Callable[[Path, WeightsKind, str, str], Awaitable[str]]


class MemoryPort(Protocol):
    async def snapshot(self, scope: str) -> int:
        """The scope's version."""

    async def query(self, query: ReflectionQuery, trial: Trial | None = None) -> Retrieved:
        """Raises DomainError SNAPSHOT_REDACTED (metadata `version`: the oldest that can be read), NO_EMBEDDER, and
        REQUEST_CONFLICT where a key of the trial was drawn for other entries."""

    async def add(
        self,
        request_id: str,
        scope: str,
        text: str,
        provenance: Provenance,
        labels: Labels | None = None,
        *,
        unless_known: bool = False,
    ) -> str:
        """Returns the reflection's id. A repeated request id changes nothing. With `unless_known` the id is that of an
        entry of the scope that has this environment, kind and text, if there is one."""

    async def add_all(self, additions: Sequence[Addition]) -> Sequence[str]:
        """Adds them in this order, each as `add` does, and returns their ids. Raises the first error; the others are
        added all the same."""

    async def revise(
        self,
        reflection_id: str,
        request_id: str,
        expected_revision: int,
        *,
        text: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> int:
        """Rewrites what is given, and returns the new revision. A repeated request id changes nothing while its
        revision is the newest. Raises DomainError REVISION_CONFLICT where the newest revision is another one, and
        UNKNOWN_REFLECTION for what is deleted or erased."""

    async def report(self, outcomes: Sequence[UseOutcome]) -> int:
        """Returns how many uses counted: each counts once. Raises DomainError UNKNOWN_USE, and records none."""


class LearnerPort(Protocol):
    @property
    def fingerprint(self) -> str:
        """Of the model that is trained."""

    @property
    def limits(self) -> ModelLimits:
        """Of the model that is trained."""

    @property
    def adapted_layers(self) -> tuple[str, ...]:
        """With LoRA, the layers with an adapter: the last part of each name, once. Empty without LoRA, and where the
        server does not report them."""

    @property
    def share_done(self) -> float:
        """Of the data of the `forward` or `forward_backward` that runs; 0 while it is not known. Between calls it means
        nothing."""

    async def forward(self, data: Sequence[Datum]) -> list[tuple[float, ...]]:
        """Log-probabilities of each datum's trained tokens under the present weights."""

    async def forward_backward(self, data: Sequence[Datum], loss: LossSettings) -> dict[str, float]: ...

    async def optim_step(self) -> dict[str, float]: ...

    async def save_checkpoint(self, name: str) -> None: ...

    async def load_checkpoint(self, name: str) -> None: ...

    async def publish_weights(self, policy_version: int, keep: Collection[int] = ()) -> PublishedWeights:
        """Older versions are deleted, but never one in `keep`."""

    async def close(self) -> None:
        """Deletes the learner at its server. What was not saved is lost."""
