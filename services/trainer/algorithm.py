"""Experiential Reinforcement Learning: arXiv 2602.13949, algorithm 2, over four services.

    y1 ~ π(·|x) → f1, r1          attempt
    r1 ≥ τ: done                  no reflection after a success
    Δ  ~ π(·|x, y1, f1, r1, m)    reflection
    y2 ~ π(·|x, Δ) → f2, r2       second attempt, on the identical task
    r2 ≥ τ: m ← Δ                 memory
    L = RL(y1) + RL(Δ) + RL(y2) − E[1(r2 > 0) log π(y2|x)]

RLVR and the paper's ablations are settings of the same code (`AlgorithmSettings`). Where another policy writes the
reflections (`policies.reflector`), RL(Δ) is left out: the trained policy did not sample those tokens.

Deviations from the paper and its reference code:
1. The memory takes Δ when r2 ≥ τ. The paper writes r2 > τ, which cannot fire when the largest reward is τ.
2. A group of one has zero advantage (the reference gives it its raw reward).
3. The distilled context is exactly the deployed one, x (the reference's differ by a sentence).
4. Attempts that end in an infrastructure error are excluded from training and counted (the reference gives reward 0).
5. Old log-probabilities come from the learner. The engine's only correct the mismatch between the two, which the
   reference does not correct.
6. A step reads one memory snapshot, taken at its start; its writes follow at its end in (task, rollout) order.
7. All branches, the distilled one too, are trained at the temperature that their tokens were sampled at.
8. Several optimizer steps share a step's data: each sees all branches at equal weight (`batch.minibatches`).
9. A reflection that was cut at its token limit is never stored in the memory, and trained on only with
   `train_cut_reflections`: nobody knows its missing rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from mulligan.common.inference import SamplingParams
from mulligan.common.rewards import exceeds, reaches
from mulligan.common.tasks import gather_or_cancel
from mulligan.common.types import (
    Attempt,
    DistilledTarget,
    Experience,
    Outcome,
    Provenance,
    Reflection,
    StoredReflection,
)
from mulligan.trainer.batch import minibatches, training_data
from mulligan.trainer.data import Datum, ModelLimits, PolicyGradient
from mulligan.trainer.harness import Harness, fill, trace_of
from mulligan.trainer.interfaces import LearnerPort, MemoryPort
from mulligan.trainer.metrics import mean_metrics, rollout_metrics
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.settings import EvaluationSettings, RolloutSettings, RunSettings, SecondAttempt
from mulligan.trainer.trainable import NotDistilled, counted, never_fits, trainable, with_usable_reward

Part = TypeVar("Part", Attempt, Reflection)
_MAX_MEMORY_BYTES = 2**20  # of AddReflectionRequest


class Recorder(Protocol):
    """Stores attempts and reflections when they are sampled, and finds those from before a restart."""

    def find(self, part_id: str, kind: type[Part]) -> Part | None: ...

    def add(self, part: Attempt | Reflection) -> None: ...

    def complete(self, experience: Experience) -> None: ...


class NoRecorder:
    """Stores nothing: for loops that are never resumed."""

    def find(self, part_id: str, kind: type[Part]) -> Part | None:
        return None

    def add(self, part: Attempt | Reflection) -> None:
        return None

    def complete(self, experience: Experience) -> None:
        return None


@dataclass(frozen=True)
class Erl:
    """The algorithm of one run. `Run` calls `sample`, `learn` and `memorise` once per step.

    `sample` queries the memory once. Then `chain` runs for every (task, rollout): the harness plays the first attempt,
    writes the reflection and plays the second attempt, and `_distill` makes the distilled target. `learn` drops what
    cannot be trained on (`trainable`), turns the rest into weighted data (`training_data`), deals them out to optimizer
    steps (`minibatches`), and calls the learner for each. `memorise` stores the reflections that led to a success.

    Every attempt and reflection goes to the recorder as soon as it exists. A repeated step finds them there.
    """

    run_id: str
    settings: RunSettings
    harness: Harness
    memory: MemoryPort
    learner: LearnerPort
    recorder: Recorder

    async def sample(self, step: int, task_ids: Sequence[str], memory_version: int) -> list[Experience]:
        """The experiences of one step, in (task, rollout) order. Reflections see the memory at `memory_version`."""
        entries = await self._query_memory(memory_version)
        slots = asyncio.Semaphore(self.settings.rollout.concurrency)

        async def limited(slot: int, task_id: str, rollout: int) -> Experience:
            async with slots:
                return await self.chain(step, slot, task_id, rollout, entries)

        return await gather_or_cancel(
            limited(slot, task_id, rollout)
            for slot, task_id in enumerate(task_ids)
            for rollout in range(self.settings.rollout.rollouts_per_task)
        )

    async def chain(
        self, step: int, slot: int, task_id: str, rollout: int, entries: Sequence[StoredReflection]
    ) -> Experience:
        """Algorithm 2, lines 3–12, for one rollout of one task."""
        algorithm = self.settings.algorithm
        chain_id = f"{self.run_id}-s{step}-t{slot}-r{rollout}"
        seed = derive_seed(self.settings.seed, step, task_id, slot, rollout)
        experience = Experience(
            chain_id,
            self.run_id,
            step,
            self.harness.info.name,
            task_id,
            rollout,
            await self._first(chain_id, task_id, seed),
        )
        first = experience.first_attempt
        unsolved = first.reward is not None and not reaches(first.reward, algorithm.success_threshold)
        if unsolved and algorithm.second_attempt is not SecondAttempt.NONE:
            experience = await self._second_chance(experience, seed, entries)
        self.recorder.complete(experience)
        return experience

    async def learn(self, step: int, experiences: Sequence[Experience]) -> dict[str, float]:
        """One loss over all branches, in `optimizer_steps` optimizer steps."""
        samples, dropped = trainable(experiences, self._limits, self.settings.algorithm)
        data = training_data(samples, self.settings.algorithm)
        if not self._regularised:
            data = [datum for datum in data if not _without_gradient(datum)]
        if not data:
            return counted(dropped)
        count = self.settings.algorithm.optimizer_steps
        if count > 1:
            data = await self._with_old_log_probs(data)
        metrics = []
        for minibatch in minibatches(data, count, derive_seed(self.settings.seed, step, "minibatch")):
            losses = await self.learner.forward_backward(minibatch, self.settings.loss)
            metrics.append(losses | await self.learner.optim_step())
        return mean_metrics(metrics) | counted(dropped)

    async def memorise(self, experiences: Sequence[Experience]) -> None:
        """m ← Δ for each reflection that led to a success. A repetition has the same request ids and adds nothing."""
        for experience in experiences:
            first = experience.first_attempt
            reflection = experience.reflection
            second = experience.second_attempt
            if not is_memorable(experience, self.settings.algorithm.success_threshold):
                continue
            assert reflection is not None and second is not None
            assert first.reward is not None and second.reward is not None
            provenance = Provenance(
                run_id=self.run_id,
                experience_id=experience.experience_id,
                environment=experience.environment,
                task_id=experience.task_id,
                policy_version=reflection.policy_version,
                reward_before=first.reward,
                reward_after=second.reward,
                success=True,
            )
            await self.memory.add(reflection.reflection_id, self.memory_scope, reflection.text, provenance)

    def metrics(self, experiences: Sequence[Experience]) -> dict[str, float]:
        return rollout_metrics(experiences, self.settings.algorithm.success_threshold)

    @property
    def memory_scope(self) -> str:
        return self.settings.algorithm.memory_scope or self.run_id

    async def _query_memory(self, memory_version: int) -> Sequence[StoredReflection]:
        algorithm = self.settings.algorithm
        if algorithm.second_attempt is not SecondAttempt.REFLECTION or algorithm.memory_entries == 0:
            return ()
        return await self.memory.query(
            self.memory_scope,
            self.harness.info.name,
            algorithm.memory_strategy,
            algorithm.memory_entries,
            memory_version,
        )

    async def _first(self, chain_id: str, task_id: str, seed: int) -> Attempt:
        return await self._attempt(f"{chain_id}-first", task_id, self.harness.info.prompts.solver, seed, "first")

    async def _second_chance(
        self, experience: Experience, seed: int, entries: Sequence[StoredReflection]
    ) -> Experience:
        """Reflection (or its ablation), second attempt, distilled target."""
        prompts = self.harness.info.prompts
        chain_id = experience.experience_id
        first = experience.first_attempt
        reflection = None
        match self.settings.algorithm.second_attempt:
            case SecondAttempt.REFLECTION:
                reflection = await self._reflection(f"{chain_id}-reflection", first, seed, entries)
                used = tuple(entry.reflection_id for entry in entries)
                experience = replace(experience, reflection=reflection, memory_entry_ids=used)
                if not reflection.outcome.has_reward:
                    return experience
                system = self.harness.second_system(reflection)
            case SecondAttempt.RAW_RETRY:
                system = fill(prompts.retry, trace=trace_of(first, prompts), feedback=first.feedback)
            case _:
                system = prompts.try_again
        second = await self._attempt(f"{chain_id}-second", experience.task_id, system, seed, "second")
        if reflection is not None:
            reflection = replace(reflection, reward=second.reward)
        experience = replace(experience, reflection=reflection, second_attempt=second)
        try:
            return replace(experience, distilled=await self._distill(chain_id, first, second))
        except NotDistilled as error:
            return replace(experience, not_distilled=error.problem)

    async def _attempt(self, attempt_id: str, task_id: str, system: str, seed: int, role: str) -> Attempt:
        attempt = self.recorder.find(attempt_id, Attempt)
        if attempt is None or never_fits(attempt):  # the policy's context may be larger now
            rollout = self.settings.rollout
            sampling = SamplingParams(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_tokens)
            attempt = await self.harness.attempt(attempt_id, task_id, system, sampling, derive_seed(seed, role))
            self.recorder.add(attempt)
        return with_usable_reward(attempt)

    async def _reflection(
        self, reflection_id: str, first: Attempt, seed: int, entries: Sequence[StoredReflection]
    ) -> Reflection:
        reflection = self.recorder.find(reflection_id, Reflection)
        if reflection is None:
            rollout = self.settings.rollout
            sampling = SamplingParams(
                rollout.reflection_temperature, rollout.reflection_top_p, max_tokens=rollout.reflection_max_tokens
            )
            memory = "\n\n".join(entry.text for entry in entries)
            reflection = await self.harness.reflect(
                reflection_id, first, memory, sampling, derive_seed(seed, "reflection")
            )
            self.recorder.add(reflection)
        return reflection

    async def _distill(self, chain_id: str, first: Attempt, second: Attempt) -> DistilledTarget | None:
        """y2 under x alone: its first prompt segment is replaced, the rest is unchanged. None unless r2 > 0.

        Raises NotDistilled.
        """
        if second.reward is None or not exceeds(second.reward, 0) or not second.sequences:
            return None
        prompts = await self.harness.first_prompts(first, second)
        sequences = tuple(
            sequence.with_prompt(prompt) for sequence, prompt in zip(second.sequences, prompts, strict=True)
        )
        return DistilledTarget(f"{chain_id}-distilled", second.attempt_id, sequences, second.reward)

    async def _with_old_log_probs(self, data: Sequence[Datum]) -> list[Datum]:
        """PPO's old policy is the learner itself, before the first of several optimizer steps."""
        sampled = [datum for datum in data if isinstance(datum.objective, PolicyGradient)]
        old = dict(zip((datum.datum_id for datum in sampled), await self.learner.forward(sampled), strict=True))
        return [
            replace(datum, objective=replace(datum.objective, old_log_probs=old[datum.datum_id]))
            if isinstance(datum.objective, PolicyGradient)
            else datum
            for datum in data
        ]

    @property
    def _limits(self) -> ModelLimits:
        """The learner's limits, or the policy's where the learner reports none: both have the same model."""
        learner = self.learner.limits
        policy = self.harness.policy_info
        return ModelLimits(
            learner.vocabulary_size or policy.vocabulary_size, learner.context_length or policy.context_length
        )

    @property
    def _regularised(self) -> bool:
        return self.settings.loss.kl_coefficient > 0 or self.settings.loss.entropy_coefficient > 0


async def evaluate(
    harness: Harness,
    name: str,
    task_ids: Sequence[str],
    settings: EvaluationSettings,
    rollout: RolloutSettings,
    seed: int,
    on_end: Callable[[Attempt], None] = lambda attempt: None,
) -> list[Attempt]:
    """First attempts only, without a reflection in context: the policy as it is deployed.

    `name` begins the attempts' ids and is unique for each evaluation. Evaluations with the same `seed` use the same
    random numbers. `on_end` is called with each attempt when it ends.
    """
    sampling = SamplingParams(settings.temperature, settings.top_p, settings.top_k, rollout.max_tokens)
    slots = asyncio.Semaphore(rollout.concurrency)

    async def limited(slot: int, task_id: str, sample: int) -> Attempt:
        async with slots:
            attempt_id = f"{name}-t{slot}-r{sample}"  # a task's id may be as long as an attempt's
            attempt_seed = derive_seed(seed, "evaluation", task_id, sample)
            attempt = await harness.attempt(attempt_id, task_id, harness.info.prompts.solver, sampling, attempt_seed)
            on_end(attempt)
            return attempt

    return await gather_or_cancel(
        limited(slot, task_id, sample) for slot, task_id in enumerate(task_ids) for sample in range(settings.samples)
    )


def is_memorable(experience: Experience, threshold: float) -> bool:
    """Whether the memory takes the reflection: the second attempt succeeded, and the text is complete (the policy ended
    it, not a limit), not empty, and no longer than the memory's contract allows."""
    first = experience.first_attempt
    reflection = experience.reflection
    second = experience.second_attempt
    if reflection is None or reflection.outcome is not Outcome.COMPLETED:
        return False
    if first.reward is None or second is None or second.reward is None or not reaches(second.reward, threshold):
        return False
    return 0 < len(reflection.text.encode()) <= _MAX_MEMORY_BYTES


def _without_gradient(datum: Datum) -> bool:
    if isinstance(datum.objective, PolicyGradient):
        return datum.objective.advantage == 0 or datum.weight == 0
    return datum.objective.target_weight == 0
