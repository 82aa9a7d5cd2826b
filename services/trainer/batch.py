"""From samples to the data of the optimizer steps."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from mulligan.common.experience import (
    Experience,
    Sample,
    Segment,
    SegmentKind,
    TokenSequence,
    Trained,
    TrainingTarget,
)
from mulligan.common.rewards import total
from mulligan.common.types import Outcome
from mulligan.trainer.advantages import Advantage, Return, estimated
from mulligan.trainer.aggregation import aggregate
from mulligan.trainer.data import Datum, Distillation, PolicyGradient
from mulligan.trainer.objective import InputKind, Objective, Tokens, inputs_of
from mulligan.trainer.objectives import name_of
from mulligan.trainer.objectives.divergence import Divergence
from mulligan.trainer.objectives.preference import Preference
from mulligan.trainer.objectives.transfer import Transfer
from mulligan.trainer.settings import AlgorithmSettings

Group = list[Experience]
_OF_THE_POLICY = {"rollout_log_probs", "old_log_probs"}  # not given by the algorithm


def groups_of(experiences: Iterable[Experience]) -> list[Group]:
    """The experiences of each task of the step, in (task, rollout) order, in whatever order they finished."""
    by_task: dict[str, Group] = defaultdict(list)
    for experience in experiences:
        by_task[experience.experience_id.rpartition("-")[0]].append(experience)  # a task can be drawn twice in a step
    return list(by_task.values())


def returns(sample: Sample, before: float | None = None) -> Return:
    """What an advantage estimator is told of a sample with a reward. `before` is that of the attempt that it improves
    on."""
    assert sample.reward is not None
    counts = [len(segment.token_ids) for sequence in sample.sequences for segment in sequence.segments if segment.loss]
    rewards = [turn.reward for turn in sample.turns]
    if not sample.sequences:  # it cannot be trained on, but its turns count in its group
        counts = [0] * len(rewards)
    if not sample.is_episode or len(counts) != len(rewards):
        counts, rewards = [sum(counts)], [sample.reward]
    return Return(sample.reward, tuple(rewards), tuple(counts), sample.outcome is Outcome.TRUNCATED, before)


def with_reward(groups: Sequence[Group], role: str) -> list[list[Sample]]:
    """The first sample of the role of each member of a group, where it has a reward."""
    found = [[one.sample(role) for one in group] for group in groups]
    return [[sample for sample in samples if sample and sample.reward is not None] for samples in found]


def number_trained(groups: Iterable[Iterable[Sample]], targets: int = 0) -> int:
    """How many of the samples have tokens to train on, and so many targets beside them; at least 1, because losses are
    divided by it."""
    samples = sum(bool(sample.sequences) and not sample.policy for group in groups for sample in group)
    return max(1, samples + targets)


def rewards_before(groups: Iterable[Group]) -> dict[str, float]:
    """For `gradients`: what an experience's first sample earned, by the ids of the samples that follow it."""
    rewards = {later.sample_id: one.samples[0].reward for group in groups for one in group for later in one.samples[1:]}
    return {sample_id: reward for sample_id, reward in rewards.items() if reward is not None}


def gradients(
    groups: Sequence[Sequence[Sample]],
    settings: AlgorithmSettings,
    weight: float,
    branch: str,
    before: Mapping[str, float] | None = None,
) -> list[Datum]:
    """The policy gradients of a branch: each sample's advantage in its group as `settings.advantage` estimates it,
    token losses summed as `settings.aggregation` says. `weight` is that of a sample.

    All samples have a reward. Those of another policy and those without tokens give no data, but count in their groups.
    `before` has the reward of the attempt that a sample improves on, by the sample's id.
    """
    data: list[Datum] = []
    for group, found in zip(groups, advantages(groups, settings, before), strict=True):
        for sample, advantage in zip(group, found, strict=True):
            if not sample.policy:
                data += policy_gradient(sample, advantage, weight, branch)
    return aggregate(data, settings.aggregation, settings.aggregation_constant)


def advantages(
    groups: Sequence[Sequence[Sample]], settings: AlgorithmSettings, before: Mapping[str, float] | None = None
) -> list[list[Advantage]]:
    """Each sample's advantage in its group, as `gradients` has it, for branches that are trained otherwise.

    Raises ValueError where the estimator does not give one number, or one per sampled token, for each sample.
    """
    before = before or {}
    told = [[returns(sample, before.get(sample.sample_id)) for sample in group] for group in groups]
    return estimated(settings.advantage, settings.estimator_settings, told)


def policy_gradient(sample: Sample, advantage: Advantage, weight: float, branch: str) -> list[Datum]:
    """The data of a sample, one per token sequence. The advantage is one for all its sampled tokens, or one each."""
    objectives = [
        PolicyGradient(one, tuple(sequence.log_probs), advantages=several)
        for sequence, (one, several) in zip(sample.sequences, _shares(advantage, sample.sequences), strict=True)
    ]
    return data_of(sample, sample.temperature, weight, branch, objectives)


def transfer(
    target: TrainingTarget,
    source: Sample,
    advantage: Advantage,
    weight: float,
    branch: str,
    *,
    shape: float = 0.0,
    ratio: bool = False,
) -> list[Datum]:
    """The data of a target, one per token sequence: its source's advantage in another context. `shape` and `ratio` are
    those of `Transfer`."""
    objectives = [
        Transfer(one, shape, ratio=float(ratio), advantages=several)
        for one, several in _shares(advantage, target.sequences)
    ]
    return data_of(target, source.temperature, weight, branch, objectives)


def divergence(sample: Sample, teacher: TrainingTarget, beta: float, weight: float, branch: str) -> list[Datum]:
    """The data of a sample, one per token sequence: what the present model says in `teacher`, the same tokens in
    another context, is taught to it in the sample's."""
    objectives = [Divergence(_tokens(sequence), beta) for sequence in teacher.sequences]
    return data_of(sample, sample.temperature, weight, branch, objectives)


def preferences(
    pairs: Iterable[tuple[TrainingTarget | Sample, Sample]], beta: float, ftx: float, weight: float, branch: str
) -> list[Datum]:
    """A branch of pairs, each of a chosen answer and a rejected one: the mean over those that give data. `weight` is
    that of the branch."""
    data = [datum for chosen, rejected in pairs for datum in preference(chosen, rejected, beta, ftx, weight, branch)]
    return [replace(datum, weight=weight / len(data)) for datum in data]


def preference(
    chosen: TrainingTarget | Sample, rejected: Sample, beta: float, ftx: float, weight: float, branch: str
) -> list[Datum]:
    """The datum of a pair. No datum where one of the two is not a single token sequence, or of another policy."""
    policies = {one.policy for one in (chosen, rejected) if isinstance(one, Sample)}
    if policies != {""} or not len(chosen.sequences) == len(rejected.sequences) == 1:
        return []
    objective = Preference(_tokens(rejected.sequences[0]), beta, ftx)
    return data_of(chosen, rejected.temperature, weight, branch, [objective])


def data_of(
    source: Sample | TrainingTarget, temperature: float, weight: float, branch: str, objectives: Sequence[Objective]
) -> list[Datum]:
    """The data of a sample or target: one per token sequence, each with its objective."""
    identity = source.sample_id if isinstance(source, Sample) else source.target_id
    numbered = _numbered(identity, source.sequences)
    return [
        Datum(datum_id, *_ids_and_mask(sequence), weight, temperature, objective, branch)
        for (datum_id, sequence), objective in zip(numbered, objectives, strict=True)
    ]


def rewarded(episode: Sample, turn_rewards: Sequence[float]) -> Sample:
    """The episode with other rewards of its turns, in order, for `gradients`; its own is their sum. Raises ValueError
    unless there is one reward per turn."""
    turns = [replace(turn, reward=reward) for turn, reward in zip(episode.turns, turn_rewards, strict=True)]
    return replace(episode, turns=tuple(turns), reward=total(turn_rewards))


def rest_of(episode: Sample, turn: int) -> Sample:
    """The episode from a turn on, which counts from the start of the task: its reward from there, and only tokens that
    were sampled from there carry loss. Without tokens to train on, it has no sequence."""
    before = turn - (episode.forked_from.step_index if episode.forked_from else 0)
    sequences = [one for sequence in episode.sequences if (one := _without_first(sequence, before)).sampled_count]
    turns = episode.turns[before:]
    reward = None if episode.reward is None else total(one.reward for one in turns)
    return replace(episode, turns=turns, reward=reward, sequences=tuple(sequences))


def imitation(
    targets: Sequence[tuple[TrainingTarget | Sample, float]], settings: AlgorithmSettings, weight: float, branch: str
) -> list[Datum]:
    """A branch of supervised learning: -log π of each target, token losses summed as `settings.aggregation` says.

    A target comes with the temperature of its sampling. A sample is imitated in the context that it was sampled in.
    `weight` is that of a target. Samples of another policy and those without tokens give no data.
    """
    data: list[Datum] = []
    for target, temperature in targets:
        if not (isinstance(target, Sample) and target.policy):
            data += distillation(target, temperature, 1.0, weight, branch)
    return aggregate(data, settings.aggregation, settings.aggregation_constant)


def distillation(
    target: TrainingTarget | Sample, temperature: float, target_weight: float, weight: float, branch: str
) -> list[Datum]:
    """The data of a target, one per token sequence. `temperature` is that of the source's sampling."""
    return data_of(target, temperature, weight, branch, [Distillation(target_weight)] * len(target.sequences))


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
    """What the journal keeps of the data: all but their tokens, which it has. Raises ValueError for a datum that is of
    no sample or target."""
    tokens_in = [_tokens_in(experience) for experience in experiences]
    place_of = {source_id: place for place, known in enumerate(tokens_in) for source_id in known}
    found = []
    for datum in data:
        source_id = datum.datum_id if datum.datum_id in place_of else datum.datum_id.rpartition(".")[0]
        if source_id not in place_of:
            raise ValueError(f"the datum {datum.datum_id!r} is of no sample or target of the step")
        place = place_of[source_id]
        own = tokens_in[place][source_id]
        nearest = [tokens_in[place], *tokens_in]  # another member may have sampled the same
        numbers = inputs_of(datum.objective, InputKind.NUMBER).items()
        values = inputs_of(datum.objective, InputKind.TOKEN_VALUES).items()
        tokens = inputs_of(datum.objective, InputKind.TOKENS).items()
        found.append(
            Trained(
                datum_id=datum.datum_id,
                source_id=source_id,
                sequence=own.index(datum.token_ids) if datum.token_ids in own else 0,
                branch=datum.branch,
                objective=name_of(type(datum.objective)),
                weight=float(datum.weight),  # the numbers may be those of another library
                numbers={name: float(one) for name, one in numbers},
                values={
                    name: tuple(map(float, each)) for name, each in values if len(each) and name not in _OF_THE_POLICY
                },
                others={name: other for name, one in tokens if (other := _with_tokens(one.token_ids, nearest))},
            )
        )
    return found


def _tokens_in(experience: Experience) -> dict[str, list[tuple[int, ...]]]:
    """The token sequences of its samples and targets, by their ids."""
    sources = {one.sample_id: one.sequences for one in experience.samples}
    sources |= {one.target_id: one.sequences for one in experience.targets}
    return {source_id: [tuple(one.token_ids) for one in sequences] for source_id, sequences in sources.items()}


def _with_tokens(tokens: tuple[int, ...], known: Iterable[Mapping[str, list[tuple[int, ...]]]]) -> str:
    """The first sample or target with these tokens; empty if there is none."""
    return next((source_id for one in known for source_id, each in one.items() if tokens in each), "")


def _numbered(identity: str, sequences: Sequence[TokenSequence]) -> list[tuple[str, TokenSequence]]:
    if len(sequences) == 1:
        return [(identity, sequences[0])]
    return [(f"{identity}.{index}", sequence) for index, sequence in enumerate(sequences)]


def _shares(advantage: Advantage, sequences: Sequence[TokenSequence]) -> Iterator[tuple[float, tuple[float, ...]]]:
    """The advantage of each sequence: one number, or 0 and those of its tokens."""
    taken = 0
    for sequence in sequences:
        if isinstance(advantage, tuple):
            yield 0.0, advantage[taken : taken + sequence.sampled_count]
            taken += sequence.sampled_count
        else:
            yield advantage, ()


def _ids_and_mask(sequence: TokenSequence) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    return tuple(sequence.token_ids), tuple(sequence.loss_mask)


def _tokens(sequence: TokenSequence) -> Tokens:
    return Tokens(*_ids_and_mask(sequence))


def _without_first(sequence: TokenSequence, count: int) -> TokenSequence:
    """The tokens, of which those that were sampled in the first `count` turns carry no loss."""
    sampled = [place for place, segment in enumerate(sequence.segments) if segment.loss][:count]
    return TokenSequence(
        tuple(
            Segment(SegmentKind.ENVIRONMENT, segment.token_ids) if place in sampled else segment
            for place, segment in enumerate(sequence.segments)
        )
    )
