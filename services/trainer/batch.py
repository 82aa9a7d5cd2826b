"""From experiences to the data of the optimizer steps: advantages per group, weights per branch.

Within each branch, data are in (task, rollout) order, in whatever order the experiences finished.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mulligan.common.rewards import exceeds
from mulligan.common.types import Attempt, DistilledTarget, Experience, Reflection, TokenSequence
from mulligan.trainer.advantages import distillation_weight, group_advantages
from mulligan.trainer.data import Datum, Distillation, PolicyGradient
from mulligan.trainer.settings import AlgorithmSettings, BranchNormalization

Group = list[Experience]
FIRST = "first"
REFLECTION = "reflection"
SECOND = "second"
DISTILLED = "distilled"


def groups(experiences: Iterable[Experience]) -> list[Group]:
    """The experiences of each task of the step, without those whose first attempt is excluded."""
    by_task: dict[str, Group] = defaultdict(list)
    for experience in experiences:
        if experience.first_attempt.reward is not None:
            slot = experience.experience_id.rpartition("-")[0]  # a task can be drawn twice in a step
            by_task[slot].append(experience)
    return list(by_task.values())


def training_data(experiences: Sequence[Experience], settings: AlgorithmSettings) -> list[Datum]:
    """All data of one step: the samples of each branch, weighted and divided as `BranchNormalization` says.

    Branch `first`: the advantage among the task's first attempts. Branches `reflection` and `second`: the advantage of
    r2 among the task's second attempts; reflections by another policy are left out. Branch `distilled`: no advantage
    and no log-probabilities. Samples with zero advantage are included. Every datum has its sampling temperature.
    """
    data: list[Datum] = []
    for branch, weight, samples in (
        (FIRST, settings.first_weight, _first(experiences, settings)),
        (REFLECTION, settings.reflection_weight, _second_chance(experiences, settings, REFLECTION)),
        (SECOND, settings.second_weight, _second_chance(experiences, settings, SECOND)),
    ):
        divisor = _divisor(branch, sum(bool(sample.sequences) for sample, _ in samples), experiences, settings)
        for sample, advantage in samples:
            data.extend(_policy_gradient(sample, advantage, weight / divisor, branch))
    if settings.distillation_weight > 0:
        targets = _distilled(experiences, settings)
        divisor = _divisor(DISTILLED, len(targets), experiences, settings)
        for target, temperature, weight in targets:
            data.extend(_distillation(target, temperature, weight, settings.distillation_weight / divisor))
    return data


def minibatches(data: Sequence[Datum], count: int, seed: int) -> list[list[Datum]]:
    """Deals each branch out over at most `count` optimizer steps, in an order drawn from `seed`.

    All data of a branch must have the same weight. Every step gets the same weight of every branch, so each step's loss
    estimates the loss of the whole batch. Where a branch does not divide evenly, a datum is in several neighbouring
    steps, with a part of its weight in each.
    """
    count = max(1, min(count, len(data)))
    if count == 1:
        return [list(data)]
    dealt: list[list[Datum]] = [[] for _ in range(count)]
    for branch in dict.fromkeys(datum.branch for datum in data):
        members = [datum for datum in data if datum.branch == branch]
        random.Random(f"{seed}/{branch}").shuffle(members)
        # On a line of count · len(members) units each datum covers `count` units, and each step len(members) of them.
        for step, minibatch in enumerate(dealt):
            start = step * len(members)
            end = (step + 1) * len(members)
            for place in range(start // count, -(-end // count)):
                units = min(end, (place + 1) * count) - max(start, place * count)
                minibatch.append(replace(members[place], weight=members[place].weight * units))
    return dealt


def _divisor(branch: str, samples: int, experiences: Sequence[Experience], settings: AlgorithmSettings) -> float:
    """The number that a branch's losses are divided by (`BranchNormalization`); 1 without samples.

    TRAINABLE: of N chains, R should have a sample and T have one. A sample then weighs R / (T · N), which estimates its
    weight 1 / N under CHAINS if nothing had been lost.
    """
    normalization = settings.branch_normalization
    if normalization is BranchNormalization.OWN_COUNT or not samples:
        return max(samples, 1)
    chains = [experience for group in groups(experiences) for experience in group]
    if normalization is BranchNormalization.CHAINS:
        return len(chains)
    if branch == FIRST:
        return samples
    retried = [chain for chain in chains if chain.reflection is not None or chain.second_attempt is not None]
    if branch != DISTILLED:
        return len(chains) * samples / len(retried)
    rewards = [chain.second_attempt.reward for chain in retried if chain.second_attempt is not None]
    finished = [reward for reward in rewards if reward is not None]
    successes = sum(exceeds(reward, 0) for reward in finished)
    return len(chains) * len(finished) / len(retried) * samples / successes


def _first(experiences: Sequence[Experience], settings: AlgorithmSettings) -> list[tuple[Attempt | Reflection, float]]:
    result: list[tuple[Attempt | Reflection, float]] = []
    for group in groups(experiences):
        attempts = [experience.first_attempt for experience in group]
        result.extend(zip(attempts, _advantages(attempts, settings), strict=True))
    return result


def _second_chance(
    experiences: Sequence[Experience], settings: AlgorithmSettings, branch: str
) -> list[tuple[Attempt | Reflection, float]]:
    """The samples of `branch`, reflections or second attempts. Both have the same groups and the same reward, r2."""
    result: list[tuple[Attempt | Reflection, float]] = []
    for group in groups(experiences):
        chains = [
            (experience.reflection, experience.second_attempt)
            for experience in group
            if experience.second_attempt is not None and experience.second_attempt.reward is not None
        ]
        advantages = _advantages([second for _, second in chains], settings)
        for (reflection, second), advantage in zip(chains, advantages, strict=True):
            if branch == SECOND:
                result.append((second, advantage))
            elif reflection is not None and not reflection.policy:
                result.append((reflection, advantage))
    return result


def _distilled(
    experiences: Sequence[Experience], settings: AlgorithmSettings
) -> list[tuple[DistilledTarget, float, float]]:
    """Each target with its sampling temperature and weight."""
    result = []
    for group in groups(experiences):
        baseline = [experience.first_attempt.reward or 0.0 for experience in group]
        for experience in group:
            target = experience.distilled
            second = experience.second_attempt
            if target is not None and second is not None:
                loss = settings.distillation_loss
                subtract = settings.distillation_baseline
                weight = distillation_weight(target.reward, loss, baseline, subtract)
                result.append((target, second.temperature, weight))
    return result


def _advantages(attempts: Sequence[Attempt], settings: AlgorithmSettings) -> list[float]:
    rewards = [attempt.reward for attempt in attempts if attempt.reward is not None]
    return group_advantages(rewards, settings.normalize_by_std)


def _policy_gradient(sample: Attempt | Reflection, advantage: float, weight: float, branch: str) -> list[Datum]:
    identity = sample.attempt_id if isinstance(sample, Attempt) else sample.reflection_id
    return [
        Datum(
            datum_id=datum_id,
            token_ids=tuple(sequence.token_ids),
            loss_mask=tuple(sequence.loss_mask),
            weight=weight,
            temperature=sample.temperature,
            objective=PolicyGradient(advantage, tuple(sequence.log_probs)),
            branch=branch,
        )
        for datum_id, sequence in _numbered(identity, sample.sequences)
    ]


def _distillation(target: DistilledTarget, temperature: float, target_weight: float, weight: float) -> list[Datum]:
    return [
        Datum(
            datum_id=datum_id,
            token_ids=tuple(sequence.token_ids),
            loss_mask=tuple(sequence.loss_mask),
            weight=weight,
            temperature=temperature,
            objective=Distillation(target_weight),
            branch=DISTILLED,
        )
        for datum_id, sequence in _numbered(target.distilled_id, target.sequences)
    ]


def _numbered(identity: str, sequences: Sequence[TokenSequence]) -> list[tuple[str, TokenSequence]]:
    if len(sequences) == 1:
        return [(identity, sequences[0])]
    return [(f"{identity}.{index}", sequence) for index, sequence in enumerate(sequences)]
