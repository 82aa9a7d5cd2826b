"""From samples to the data of the optimizer steps."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mulligan.common.experience import Experience, Sample, TokenSequence, Trained, TrainingTarget
from mulligan.trainer.data import Datum, Distillation, PolicyGradient

Group = list[Experience]


def groups_of(experiences: Iterable[Experience]) -> list[Group]:
    """The experiences of each task of the step, in (task, rollout) order, in whatever order they finished."""
    by_task: dict[str, Group] = defaultdict(list)
    for experience in experiences:
        by_task[experience.experience_id.rpartition("-")[0]].append(experience)  # a task can be drawn twice in a step
    return list(by_task.values())


def policy_gradient(sample: Sample, advantage: float, weight: float, branch: str) -> list[Datum]:
    """The data of a sample, one per token sequence, with one advantage for all its tokens."""
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
        for datum_id, sequence in _numbered(sample.sample_id, sample.sequences)
    ]


def distillation(
    target: TrainingTarget, temperature: float, target_weight: float, weight: float, branch: str
) -> list[Datum]:
    """The data of a target, one per token sequence. `temperature` is that of the source's sampling."""
    return [
        Datum(
            datum_id=datum_id,
            token_ids=tuple(sequence.token_ids),
            loss_mask=tuple(sequence.loss_mask),
            weight=weight,
            temperature=temperature,
            objective=Distillation(target_weight),
            branch=branch,
        )
        for datum_id, sequence in _numbered(target.target_id, target.sequences)
    ]


def minibatches(data: Sequence[Datum], count: int, seed: int) -> list[list[Datum]]:
    """Deals each branch out over at most `count` optimizer steps, in an order drawn from `seed`.

    Every step gets equally many data of a branch, so each step's loss estimates the loss of the whole batch; the mean
    of the steps' losses is exactly that. Weights within a branch may differ; if they are equal, every step has exactly
    the branch's weight. Where a branch does not divide evenly, a datum is in several neighbouring steps, with a part of
    its weight in each.
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


def trained(data: Iterable[Datum], experiences: Sequence[Experience]) -> list[Trained]:
    """What the journal keeps of the data: all but their tokens, which it has."""
    known = {one.sample_id for experience in experiences for one in experience.samples}
    known |= {one.target_id for experience in experiences for one in experience.targets}
    found = []
    for datum in data:
        source_id, sequence = datum.datum_id, "0"
        if source_id not in known:
            source_id, _, sequence = source_id.rpartition(".")
        match datum.objective:
            case PolicyGradient(advantage):
                name, numbers = "policy_gradient", {"advantage": advantage}
            case Distillation(target_weight):
                name, numbers = "distillation", {"target_weight": target_weight}
        found.append(Trained(datum.datum_id, source_id, int(sequence), datum.branch, name, datum.weight, numbers))
    return found


def _numbered(identity: str, sequences: Sequence[TokenSequence]) -> list[tuple[str, TokenSequence]]:
    if len(sequences) == 1:
        return [(identity, sequences[0])]
    return [(f"{identity}.{index}", sequence) for index, sequence in enumerate(sequences)]
