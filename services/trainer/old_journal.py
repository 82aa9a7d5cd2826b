"""Records of journals from before samples had roles: attempts and reflections of ERL. They are read as samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from mulligan.common.experience import Sample, TokenSequence, TrainingTarget, Turn
from mulligan.common.types import Outcome

FIRST = "first"
REFLECTION = "reflection"
SECOND = "second"
DISTILLED = "distilled"


class OldAttempt(msgspec.Struct, frozen=True):
    attempt_id: str
    episode_id: str
    outcome: Outcome
    reward: float | None
    feedback: str
    turns: tuple[Turn, ...]
    final_observation: str
    sequences: tuple[TokenSequence, ...]
    temperature: float
    error: str = ""
    restarts: int = 0


class OldReflection(msgspec.Struct, frozen=True):
    reflection_id: str
    text: str
    sequences: tuple[TokenSequence, ...]
    temperature: float
    outcome: Outcome
    reward: float | None = None
    error: str = ""
    policy: str = ""


class AttemptSampled(msgspec.Struct, frozen=True, tag="attempt"):
    attempt: OldAttempt

    def sample(self) -> Sample:
        """As the sample that it is. What it followed from is told by its experience."""
        old = self.attempt
        return Sample(
            sample_id=old.attempt_id,
            role=old.attempt_id.rpartition("-")[2],
            outcome=old.outcome,
            sequences=old.sequences,
            temperature=old.temperature,
            reward=old.reward,
            error=old.error,
            episode_id=old.episode_id,
            turns=old.turns,
            feedback=old.feedback,
            final_observation=old.final_observation,
            restarts=old.restarts,
        )


class ReflectionSampled(msgspec.Struct, frozen=True, tag="reflection"):
    reflection: OldReflection

    def sample(self) -> Sample:
        old = self.reflection
        return Sample(
            sample_id=old.reflection_id,
            role=REFLECTION,
            outcome=old.outcome,
            sequences=old.sequences,
            temperature=old.temperature,
            reward=old.reward,
            error=old.error,
            policy=old.policy,
            text=old.text,
        )


class OldExperience(msgspec.Struct, frozen=True, tag="experience"):
    """The distilled target is the second attempt's sequences with `distilled_prompts` in place of the first
    segments."""

    experience_id: str
    run_id: str
    step: int
    environment: str
    task_id: str
    rollout: int
    first_id: str
    reflection_id: str | None
    second_id: str | None
    distilled_id: str | None
    distilled_prompts: list[list[int]]
    memory_entry_ids: list[str]
    not_distilled: str = ""

    @property
    def sample_ids(self) -> list[str]:
        return [found for found in (self.first_id, self.reflection_id, self.second_id) if found]

    def credits(self, samples: Mapping[str, Sample]) -> dict[str, float]:
        """A reflection had the reward of the second attempt."""
        second = samples[self.second_id] if self.second_id else None
        if second is None or second.reward is None or not self.reflection_id:
            return {}
        return {self.reflection_id: second.reward}

    def targets(self, samples: Mapping[str, Sample]) -> list[TrainingTarget]:
        if not self.distilled_id or not self.second_id:
            return []
        second = samples[self.second_id]
        pairs = zip(second.sequences, self.distilled_prompts, strict=True)
        sequences = tuple(sequence.with_prompt(prompt) for sequence, prompt in pairs)
        return [TrainingTarget(self.distilled_id, DISTILLED, second.sample_id, sequences)]


def with_parents(samples: list[Sample]) -> list[Sample]:
    """ERL's parts form a chain: each follows from the one before."""
    parents = ["", *(sample.sample_id for sample in samples)]
    return [replace(sample, parent_id=parent) for sample, parent in zip(samples, parents, strict=False)]
