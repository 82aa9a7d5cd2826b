"""The four ports without gRPC: the same environment, engine, store and learner, called directly.

What `benchmarks.run` holds the services against, and the quickest way to try settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import DomainError, Reason
from services.common.types import (
    Completion,
    Continuation,
    EnvironmentInfo,
    EpisodeStep,
    Outcome,
    PolicyInfo,
    Prompt,
    Provenance,
    PublishedWeights,
    RetrievalStrategy,
    SamplingParams,
    Split,
    StoredReflection,
    TaskInfo,
    VersionSpan,
)
from services.env.base import Environment, Episode
from services.memory.store import Store
from services.policy.backend import Backend, WeightsFile


class LocalEnvironment:
    def __init__(self, environments: Mapping[str, Environment]):
        self._environments = environments

    async def describe(self, environment: str) -> EnvironmentInfo:
        if environment not in self._environments:
            raise DomainError(Reason.UNKNOWN_ENVIRONMENT, f"no environment {environment!r}")
        return self._environments[environment].info

    async def list_tasks(self, environment: str, split: Split, limit: int) -> list[TaskInfo]:
        count = self._environments[environment].info.task_counts[split]
        return list(self._environments[environment].list_tasks(split, 0, min(limit, count) if limit else count))

    async def start(self, environment: str, task_id: str, episode_id: str) -> LocalEpisode:
        return LocalEpisode(episode_id, self._environments[environment].start(task_id))


@dataclass
class LocalEpisode:
    episode_id: str
    episode: Episode

    @property
    def observation(self) -> str:
        return self.episode.observation

    async def step(self, action: str) -> EpisodeStep:
        result = self.episode.step(action)
        outcome = (Outcome.TRUNCATED if result.truncated else Outcome.COMPLETED) if result.done else None
        return EpisodeStep(
            result.observation, result.action, result.reward, result.done, outcome, result.feedback
        )

    async def end(self) -> None:
        return None


class LocalPolicy:
    def __init__(self, backend: Backend):
        self._backend = backend

    async def info(self) -> PolicyInfo:
        return self._backend.info

    async def tokenize(self, prompt: Prompt | str) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self._backend.encode(prompt))
        if isinstance(prompt, Continuation):
            return self._backend.chat.extend(prompt)
        return self._backend.chat.render(prompt) if isinstance(prompt, tuple) else ()

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, *, request_id: str = "", min_policy_version: int | None = None
    ) -> Completion:
        added = await self.tokenize(prompt)
        start = prompt.token_ids if isinstance(prompt, Continuation) else prompt if isinstance(prompt, list) else ()
        sampled = await self._backend.generate((*start, *added), sampling)
        return Completion(
            prompt_token_ids=added,
            token_ids=sampled.token_ids,
            log_probs=sampled.log_probs,
            text=self._backend.decode(sampled.token_ids),
            stop_reason=sampled.stop_reason,
            policy_versions=(VersionSpan(sampled.policy_version, len(sampled.token_ids)),),
        )

    async def update_weights(self, weights: PublishedWeights) -> None:
        path = Path(weights.uri.removeprefix("file://"))
        file = WeightsFile(path, weights.kind, weights.policy_version, weights.sha256)
        await self._backend.update_weights(file)


class LocalMemory:
    def __init__(self, store: Store):
        self._store = store

    async def snapshot(self, scope: str) -> int:
        return (await self._store.snapshot(scope)).version

    async def query(
        self, scope: str, environment: str, strategy: RetrievalStrategy, limit: int, as_of_version: int | None = None
    ) -> tuple[StoredReflection, ...]:
        return (await self._store.query(scope, environment, strategy, limit, as_of_version)).reflections

    async def add(self, request_id: str, scope: str, text: str, provenance: Provenance) -> str:
        return (await self._store.add(request_id, scope, text, provenance)).reflection_id
