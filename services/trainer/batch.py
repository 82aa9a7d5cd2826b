"""From experiences to the data of the optimizer steps: advantages per group, weights per branch.

Data are in (task, rollout) order within each branch, whatever order the chains finished in.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence, Sized

from services.common.types import Attempt, DistilledTarget, Experience, Reflection, TokenSequence
from services.trainer.advantages import distillation_weight, group_advantages
from services.trainer.data import Datum, Distillation, PolicyGradient
from services.trainer.settings import AlgorithmSettings, BranchNormalization

Group = list[Experience]
FIRST, REFLECTION, SECOND, DISTILLED = "first", "reflection", "second", "distilled"


def groups(experiences: Iterable[Experience]) -> list[Group]:
    """The chains of each task. An excluded first attempt leaves its group."""
    by_task: dict[str, Group] = defaultdict(list)
    for experience in experiences:
        if experience.first_attempt.reward is not None:
            slot = experience.experience_id.rpartition("-")[0]  # a task can be drawn twice in a step
            by_task[slot].append(experience)
    return list(by_task.values())


def training_data(experiences: Sequence[Experience], settings: AlgorithmSettings) -> list[Datum]:
    """All data of one step, each branch weighted and normalised by a count of samples, zero advantage included: its
    own, or that of the step's chains.

    first: advantage within the task's chains. reflection and second: advantage of r2 within the task's failing chains
    whose second attempt has a reward; what another policy than the trained one reflected is no sample. distilled: no
    group, no advantage, no log-probabilities.
    """
    chains = sum(len(group) for group in groups(experiences))

    def count(samples: Sized) -> int:
        return chains if settings.branch_normalization is BranchNormalization.CHAINS else len(samples)

    data: list[Datum] = []
    for branch, weight, samples in (
        (FIRST, settings.first_weight, _first(experiences, settings)),
        (REFLECTION, settings.reflection_weight, _second_chance(experiences, settings, REFLECTION)),
        (SECOND, settings.second_weight, _second_chance(experiences, settings, SECOND)),
    ):
        for sample, advantage in samples:
            data.extend(_policy_gradient(sample, advantage, weight / count(samples), branch))
    if settings.distillation_weight > 0:
        targets = _distilled(experiences, settings)
        for target, weight in targets:
            data.extend(_distillation(target, weight, settings.distillation_weight / count(targets)))
    return data


def minibatches(data: Sequence[Datum], count: int, seed: int) -> list[list[Datum]]:
    """Deals each branch out evenly over `count` optimizer steps, shuffled, so that each step sees every branch.

    Weights are multiplied by the number of steps: each step's loss estimates the whole batch's.
    """
    count = max(1, min(count, len(data)))
    dealt: list[list[Datum]] = [[] for _ in range(count)]
    place = 0
    for branch in dict.fromkeys(datum.branch for datum in data):
        members = [datum for datum in data if datum.branch == branch]
        if count > 1:
            random.Random(f"{seed}/{branch}").shuffle(members)
        for datum in members:
            dealt[place % count].append(_scaled(datum, count))
            place += 1
    return dealt


def _first(experiences: Sequence[Experience], settings: AlgorithmSettings) -> list[tuple[Attempt | Reflection, float]]:
    result: list[tuple[Attempt | Reflection, float]] = []
    for group in groups(experiences):
        attempts = [experience.first_attempt for experience in group]
        result.extend(zip(attempts, _advantages(attempts, settings), strict=True))
    return result


def _second_chance(
    experiences: Sequence[Experience], settings: AlgorithmSettings, branch: str
) -> list[tuple[Attempt | Reflection, float]]:
    """Reflections and second attempts share their group and reward: r2."""
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
            elif reflection is not None and not reflection.policy:  # the ablations without reflection have none
                result.append((reflection, advantage))
    return result


def _distilled(experiences: Sequence[Experience], settings: AlgorithmSettings) -> list[tuple[DistilledTarget, float]]:
    result = []
    for group in groups(experiences):
        baseline = [experience.first_attempt.reward or 0.0 for experience in group]
        for experience in group:
            target = experience.distilled
            if target is not None:
                loss, subtract = settings.distillation_loss, settings.distillation_baseline
                result.append((target, distillation_weight(target.reward, loss, baseline, subtract)))
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


def _distillation(target: DistilledTarget, target_weight: float, weight: float) -> list[Datum]:
    return [
        Datum(
            datum_id=datum_id,
            token_ids=tuple(sequence.token_ids),
            loss_mask=tuple(sequence.loss_mask),
            weight=weight,
            temperature=1.0,
            objective=Distillation(target_weight),
            branch=DISTILLED,
        )
        for datum_id, sequence in _numbered(target.distilled_id, target.sequences)
    ]


def _numbered(identity: str, sequences: Sequence[TokenSequence]) -> list[tuple[str, TokenSequence]]:
    if len(sequences) == 1:
        return [(identity, sequences[0])]
    return [(f"{identity}.{index}", sequence) for index, sequence in enumerate(sequences)]


def _scaled(datum: Datum, factor: int) -> Datum:
    return (
        datum
        if factor == 1
        else Datum(
            datum.datum_id,
            datum.token_ids,
            datum.loss_mask,
            datum.weight * factor,
            datum.temperature,
            datum.objective,
            datum.branch,
        )
    )
