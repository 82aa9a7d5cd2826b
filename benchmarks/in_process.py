"""Environment and memory without gRPC, for comparison in `benchmarks.run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import Addition, Labels, Provenance, ReflectionQuery, Retrieved, Trial, UseOutcome
from mulligan.common.types import EnvironmentInfo, EpisodeStep, Outcome, Split, TaskInfo
from mulligan.env.base import Environment, Episode
from mulligan.memory.retrieval import retrieve
from mulligan.memory.store import Added, NewReflection, Rewriting, Store, add_all
from mulligan.memory.trials import with_uses


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
        episode = self._environments[environment].start(task_id)
        return LocalEpisode(episode_id, episode.observation, episode)


@dataclass
class LocalEpisode:
    episode_id: str
    observation: str
    episode: Episode

    async def step(self, action: str) -> EpisodeStep:
        result = self.episode.step(action)
        outcome = (Outcome.TRUNCATED if result.truncated else Outcome.COMPLETED) if result.done else None
        return EpisodeStep(result.observation, result.action, result.reward, result.done, outcome, result.feedback)

    def kept_alive(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def fork(self, new_episode_id: str) -> LocalEpisode:
        raise DomainError(Reason.FORK_UNSUPPORTED, "this stand-in has no forks")

    async def end(self) -> None:
        return None


class LocalMemory:
    def __init__(self, store: Store):
        self._store = store

    async def snapshot(self, scope: str) -> int:
        return (await self._store.snapshot(scope)).version

    async def query(self, query: ReflectionQuery, trial: Trial | None = None) -> Retrieved:
        found = await retrieve(query, self._store)
        if trial is not None:
            return await with_uses(found, query.scope, trial, self._store)
        return Retrieved(found.reflections, found.version)

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
        new = NewReflection(request_id, scope, text, provenance, labels or Labels(), unless_known=unless_known)
        return (await self._store.add(new)).reflection_id

    async def add_all(self, additions: Sequence[Addition]) -> list[str]:
        news = [
            NewReflection(
                one.request_id, one.scope, one.text, one.provenance, one.labels, unless_known=one.unless_known
            )
            for one in additions
        ]
        added = await add_all(self._store, news)
        for one in added:
            if isinstance(one, DomainError):
                raise one
        return [one.reflection_id for one in added if isinstance(one, Added)]

    async def revise(
        self,
        reflection_id: str,
        request_id: str,
        expected_revision: int,
        *,
        text: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> int:
        new_tags = None if tags is None else tuple(tags)
        rewriting = Rewriting(reflection_id, request_id, expected_revision, text, tags=new_tags)
        return (await self._store.revise(rewriting)).revision

    async def report(self, outcomes: Sequence[UseOutcome]) -> int:
        return await self._store.report(outcomes)
