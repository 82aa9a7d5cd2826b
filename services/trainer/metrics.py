"""The metrics of a step. Averages are over attempts with a reward; the others are counted as `excluded`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from mulligan.common.experience import Experience, Sample
from mulligan.common.rewards import reaches
from mulligan.trainer.batch import Group, groups_of
from mulligan.trainer.trainable import never_fits


def rollout_metrics(
    experiences: Sequence[Experience], threshold: float, environment: str, has_signal: Callable[[Group], bool]
) -> dict[str, float]:
    """`rollouts`, the number of episodes and texts, is the budget for comparing algorithms; each try of a conversation
    is an episode. `texts` and `targets` count these, `texts_ROLE` and `targets_ROLE` those of a role. They were named
    for ERL's alone, `reflections` and `distilled`; both names stay. `groups_with_signal` is the share of groups for
    which `has_signal` holds, among those with a reward.

    For the attempts of each role in `environment`, the run's own, there are `reward_ROLE` and `success_ROLE`, and
    `tries_ROLE`, their mean number, where a conversation may hold several. Those in another environment begin with its
    name: `NAME/reward_ROLE`. `NAME/rollouts` are how many of the rollouts are in it."""
    samples = [sample for experience in experiences for sample in experience.samples]
    episodes = [sample for sample in samples if sample.is_episode]
    texts = Counter(sample.role for sample in samples if not sample.is_episode)
    targets = Counter(target.role for experience in experiences for target in experience.targets)
    sequences = [sequence for sample in samples for sequence in sample.sequences]
    metrics = {
        "reflections": float(texts.total()),
        "texts": float(texts.total()),
        "distilled": float(targets.total()),
        "targets": float(targets.total()),
        "excluded": float(sum(not sample.outcome.has_reward for sample in samples)),
        "restarts": float(sum(episode.restarts for episode in episodes)),
        "rollouts": _rollouts(samples),
        "sampled_tokens": float(sum(sequence.sampled_count for sequence in sequences)),
    }
    metrics |= {f"texts_{role}": float(count) for role, count in texts.items()}
    metrics |= {f"targets_{role}": float(count) for role, count in targets.items()}
    groups = [group for group in groups_of(experiences) if rewards_of(one.samples[0] for one in group if one.samples)]
    if groups:
        metrics["groups_with_signal"] = fmean(map(has_signal, groups))
    unplayed = sum(map(never_fits, samples))
    if unplayed:
        metrics["excluded_prompt_too_long"] = float(unplayed)
    for name in dict.fromkeys(experience.environment for experience in experiences):
        own = [sample for experience in experiences if experience.environment == name for sample in experience.samples]
        if name == environment:
            metrics |= _by_role(own, threshold)
        else:
            found = {"rollouts": _rollouts(own)} | _by_role(own, threshold)
            metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
    return metrics


def _by_role(samples: Sequence[Sample], threshold: float) -> dict[str, float]:
    episodes = [sample for sample in samples if sample.is_episode]
    metrics = {}
    for role in dict.fromkeys(episode.role for episode in episodes):
        rewards = rewards_of(episode for episode in episodes if episode.role == role)
        if rewards:
            metrics[f"reward_{role}"] = fmean(rewards)
            metrics[f"success_{role}"] = fmean(reaches(reward, threshold) for reward in rewards)
        tries = [_tries(episode) for episode in episodes if episode.role == role and episode.try_turns]
        if tries:
            metrics[f"tries_{role}"] = fmean(tries)
    return metrics


def _rollouts(samples: Iterable[Sample]) -> float:
    """Episodes started and texts written."""
    return float(sum(_tries(sample) + sample.restarts if sample.is_episode else 1 for sample in samples))


def _tries(episode: Sample) -> int:
    return max(1, sum(turns > 0 for turns in episode.try_turns))


def rewards_of(samples: Iterable[Sample]) -> list[float]:
    return [sample.reward for sample in samples if sample.reward is not None]


def mean_metrics(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the optimizer steps that report it."""
    values: dict[str, list[float]] = defaultdict(list)
    for one in metrics:
        for name, value in one.items():
            values[name].append(value)
    return {name: sum(many) / len(many) for name, many in values.items()}  # fmean refuses inf and -inf together


@dataclass
class EvaluationProgress:
    """How many attempts, and texts of a protocol, have ended. `expected` is how many are known to come, `protocol` the
    label of the protocol that samples them."""

    expected: int
    threshold: float
    protocol: str = ""
    asked: int = 0
    ended: int = 0
    excluded: int = 0  # without an outcome, for a failure of the infrastructure
    rewarded: int = 0
    successes: int = 0

    def add(self, sample: Sample) -> None:
        self.ended += 1
        self.excluded += not sample.outcome.has_reward
        if sample.reward is not None:
            self.rewarded += 1
            self.successes += reaches(sample.reward, self.threshold)

    @property
    def total(self) -> int:
        return max(self.expected, self.asked)

    @property
    def success(self) -> float | None:
        """The share of successes among attempts with a reward; None before the first."""
        return self.successes / self.rewarded if self.rewarded else None
