"""The metrics of a step. Averages are over attempts with a reward; the others are counted as `excluded`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from mulligan.common.rewards import reaches
from mulligan.common.types import Attempt, Experience
from mulligan.trainer.trainable import never_fits


def rollout_metrics(experiences: Sequence[Experience], threshold: float) -> dict[str, float]:
    """`rollouts`, the number of episodes and reflections, is the budget for comparing algorithms."""
    first = [experience.first_attempt for experience in experiences]
    second = [experience.second_attempt for experience in experiences if experience.second_attempt is not None]
    reflections = [experience.reflection for experience in experiences if experience.reflection is not None]
    parts = [part for experience in experiences for part in experience.parts()]
    sequences = [sequence for part in parts for sequence in part.sequences]
    metrics = {
        "reflections": float(len(reflections)),
        "distilled": float(sum(experience.distilled is not None for experience in experiences)),
        "excluded": float(sum(not part.outcome.has_reward for part in parts)),
        "restarts": float(sum(attempt.restarts for attempt in first + second)),
        "rollouts": float(sum(1 + attempt.restarts for attempt in first + second) + len(reflections)),
        "sampled_tokens": float(sum(sequence.sampled_count for sequence in sequences)),
    }
    unplayed = sum(map(never_fits, parts))
    if unplayed:
        metrics["excluded_prompt_too_long"] = float(unplayed)
    for name, attempts in (("first", first), ("second", second)):
        rewards = rewards_of(attempts)
        if rewards:
            metrics[f"reward_{name}"] = fmean(rewards)
            metrics[f"success_{name}"] = fmean(reaches(reward, threshold) for reward in rewards)
    return metrics


def rewards_of(attempts: Iterable[Attempt]) -> list[float]:
    return [attempt.reward for attempt in attempts if attempt.reward is not None]


def mean_metrics(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the optimizer steps that report it."""
    values: dict[str, list[float]] = defaultdict(list)
    for one in metrics:
        for name, value in one.items():
            values[name].append(value)
    return {name: fmean(many) for name, many in values.items()}


@dataclass
class EvaluationProgress:
    """The progress of an evaluation."""

    total: int  # attempts
    threshold: float
    ended: int = 0
    rewarded: int = 0
    successes: int = 0

    def add(self, attempt: Attempt) -> None:
        self.ended += 1
        if attempt.reward is not None:
            self.rewarded += 1
            self.successes += reaches(attempt.reward, self.threshold)

    @property
    def success(self) -> float | None:
        """The share of successes among attempts with a reward; None before the first."""
        return self.successes / self.rewarded if self.rewarded else None
