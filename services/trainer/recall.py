"""What a run reads of the memory, and what it reports of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from mulligan.common.errors import DomainError, Reason
from mulligan.common.experience import Experience
from mulligan.common.reflections import (
    MAX_TEXT_BYTES,
    ReflectionKind,
    ReflectionQuery,
    RetrievalStrategy,
    Retrieved,
    StoredReflection,
    Trial,
    Use,
    UseOutcome,
)
from mulligan.common.rewards import reaches
from mulligan.common.tasks import PrioritySlots, gather_in_turn
from mulligan.common.types import EnvironmentInfo
from mulligan.trainer.harness import Harness
from mulligan.trainer.interfaces import MemoryPort
from mulligan.trainer.memory_settings import MemoryUseSettings
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.settings import AlgorithmSettings, RunSettings

_NOTHING = Retrieved((), 0)
_ADVICE = (ReflectionKind.RULE, ReflectionKind.DOCUMENT)


@dataclass(frozen=True)
class Reader:
    """A task before it is played. `name` is unique in the run; `keys` are the ids of the experiences that read, for
    which uses are drawn."""

    harness: Harness
    task_id: str
    name: str
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recall:
    """Retrieves entries as of one version of the scope, for each task before it is played.

    Where no uses are drawn, equal questions are asked once. `slots` limit how many first observations are asked for at
    once.
    """

    memory: MemoryPort
    settings: RunSettings
    scope: str
    version: int

    async def read(self, readers: Sequence[Reader], slots: PrioritySlots, priority: int) -> list[Retrieved]:
        """The entries for each reader, in order, and a use for each of its keys unless the run draws none."""
        if self.settings.algorithm.memory_entries == 0:
            return [_NOTHING] * len(readers)
        at_once = self.settings.rollout.begun_at_once
        queries = await gather_in_turn((self._query(reader, slots, priority) for reader in readers), at_once)
        keys = [reader.keys if self.settings.holdout else () for reader in readers]
        questions = list(zip(queries, keys, strict=True))
        distinct = list(dict.fromkeys(questions))
        found = await gather_in_turn((self._ask(query, keys) for query, keys in distinct), at_once)
        answers = dict(zip(distinct, found, strict=True))
        return [answers[question] for question in questions]

    async def _query(self, reader: Reader, slots: PrioritySlots, priority: int) -> ReflectionQuery | None:
        """None where the environment shows nothing to compare with."""
        algorithm = self.settings.algorithm
        query = query_of(algorithm, self.scope, reader.harness.info.name, reader.task_id, self.version)
        if not algorithm.compares:
            return query
        async with slots.held(priority):
            text = await reader.harness.observe(reader.task_id, reader.name)
        cut = (text or "").encode()[:MAX_TEXT_BYTES].decode(errors="ignore")
        return replace(query, text=cut) if cut else None

    async def _ask(self, query: ReflectionQuery | None, keys: tuple[str, ...]) -> Retrieved:
        """With keys, a use is drawn for each."""
        if query is None:
            return _NOTHING
        seed = derive_seed(self.settings.seed, "use")
        trial = Trial(keys, self.settings.holdout, seed) if keys else None
        try:
            return await self.memory.query(query, trial)
        except DomainError as error:
            # An entry was erased since the step began, or a step is sampled anew after other entries came: what is read
            # then is no experiment.
            if error.reason is Reason.SNAPSHOT_REDACTED:
                readable = error.metadata.get("version", "")  # of a server that keeps the contract, it is there
                return await self.memory.query(replace(query, version=int(readable) if readable.isdecimal() else None))
            if error.reason is Reason.REQUEST_CONFLICT and trial is not None:
                return await self.memory.query(query)
            raise


async def newest(memory: MemoryPort, settings: RunSettings, run_id: str) -> Recall | None:
    """Where the first attempts of an evaluation read the memory as it is now; None if first attempts read nothing. No
    uses are drawn there, as no reader has a key."""
    if not settings.algorithm.memory_readers.play:
        return None
    scope = scope_of(settings, run_id)
    return Recall(memory, settings, scope, await memory.snapshot(scope))


GLOBAL_SCOPE = "global"  # of all runs with this `memory_scope`; no run's id


def scope_of(settings: RunSettings, run_id: str) -> str:
    """The scope of a run's memory: what `memory_scope` stands for."""
    own = settings.algorithm.memory_scope or "run"
    return {"run": run_id, "environment": f"environment/{settings.environment}"}.get(own, own)


def query_of(
    settings: MemoryUseSettings, scope: str, environment: str, task_id: str = "", version: int | None = None
) -> ReflectionQuery:
    """What is asked before a task is played. Strategies that go by claims retrieve advice alone, no episodes. By key,
    the run's document is asked for."""
    by_key = settings.memory_strategy is RetrievalStrategy.BY_KEY
    kinds = (ReflectionKind.DOCUMENT,) if by_key else ()
    return ReflectionQuery(
        scope,
        environment,
        settings.memory_strategy,
        sum(part.limit for part in settings.memory_mix) or settings.memory_entries,
        version,
        kinds=_ADVICE if settings.by_claims else kinds,
        key=settings.memory_document if by_key else "",
        task_prefix="".join(task_id.rpartition("/")[:2]) if settings.memory_family else "",
        max_tokens=settings.memory_tokens,
        mix=settings.mix,
    )


def shown_in(found: Retrieved, key: str) -> tuple[tuple[StoredReflection, ...], Use | None]:
    """What the reader with this key is shown, and its use; None if none was drawn."""
    use = next((one for one in found.uses if one.use_key == key), None)
    if use is None:
        return found.reflections, None
    return tuple(one for one in found.reflections if one.reflection_id != use.left_out_id), use


def outcome_of(experience: Experience, settings: AlgorithmSettings, info: EnvironmentInfo) -> UseOutcome | None:
    """The reward of what the experience's use could change: its first attempt if that read the entries, else the
    attempts that were given a text of its reflectors, in the mean. From 0 to 1, where 1 is the environment's greatest.

    None without a use that was read, and where the infrastructure failed.
    """
    if not experience.memory_use_id:
        return None
    texts = {sample.sample_id for sample in experience.samples if not sample.is_episode}
    told = experience.samples[:1]
    if not settings.memory_readers.play:
        told = tuple(one for one in experience.samples if one.is_episode and one.parent_id in texts)
    rewards = [_scaled(one.reward, settings, info) for one in told if one.reward is not None]
    return UseOutcome(experience.memory_use_id, fmean(rewards)) if rewards else None


def _scaled(reward: float, settings: AlgorithmSettings, info: EnvironmentInfo) -> float:
    if info.max_reward <= 0:  # all rewards are penalties
        return float(reaches(reward, settings.success_threshold))
    return min(max(reward / info.max_reward, 0.0), 1.0)
