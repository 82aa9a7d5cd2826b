"""Protobuf ↔ experiences. `samples` and `targets` carry everything. The fields of ERL's four parts, which are older,
are filled beside them, and read where a peer sends nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from mulligan.common import experience as domain
from mulligan.common.types import Outcome
from mulligan.common.v1 import experience_pb2 as pb
from mulligan.common.wire import outcome_from_proto, outcome_to_proto, spans_from_proto, spans_to_proto

FIRST = "first"
REFLECTION = "reflection"
SECOND = "second"
DISTILLED = "distilled"
_KINDS = {kind: pb.SegmentKind.Value(f"SEGMENT_KIND_{kind.name}") for kind in domain.SegmentKind}
_KINDS_BACK = {value: key for key, value in _KINDS.items()}


def experience_to_proto(experience: domain.Experience) -> pb.Experience:
    message = pb.Experience(
        experience_id=experience.experience_id,
        run_id=experience.run_id,
        step=experience.step,
        environment=experience.environment,
        task_id=experience.task_id,
        rollout=experience.rollout,
        memory_entry_ids=experience.memory_entry_ids,
        samples=[_sample_to_proto(sample) for sample in experience.samples],
        targets=[_target_to_proto(target) for target in experience.targets],
        trained=[_trained_to_proto(trained) for trained in experience.trained],
        algorithm=experience.algorithm,
        untrained=experience.untrained,
        memory_use_id=experience.memory_use_id,
        memory_left_out_id=experience.memory_left_out_id,
    )
    _fill_parts(message, experience)
    return message


def experience_from_proto(message: pb.Experience) -> domain.Experience:
    samples = [_sample_from_proto(sample) for sample in message.samples]
    targets = [_target_from_proto(target) for target in message.targets]
    return domain.Experience(
        experience_id=message.experience_id,
        run_id=message.run_id,
        step=message.step,
        environment=message.environment,
        task_id=message.task_id,
        rollout=message.rollout,
        samples=tuple(samples or _samples_of_parts(message)),
        targets=tuple(targets or _targets_of_parts(message)),
        memory_entry_ids=tuple(message.memory_entry_ids),
        untrained=tuple(message.untrained),
        algorithm=message.algorithm or "erl",
        trained=tuple(_trained_from_proto(trained) for trained in message.trained),
        memory_use_id=message.memory_use_id,
        memory_left_out_id=message.memory_left_out_id,
    )


def _sample_to_proto(sample: domain.Sample) -> pb.Sample:
    fork = sample.forked_from
    return pb.Sample(
        sample_id=sample.sample_id,
        role=sample.role,
        parent_id=sample.parent_id,
        policy=sample.policy,
        outcome=outcome_to_proto(sample.outcome),
        reward=sample.reward,
        reward_parts=sample.reward_parts,
        system=sample.system,
        sequences=_sequences_to_proto(sample.sequences),
        temperature=sample.temperature,
        error=sample.error,
        text=sample.text,
        episode_id=sample.episode_id,
        turns=_turns_to_proto(sample.turns),
        feedback=sample.feedback,
        final_observation=sample.final_observation,
        restarts=sample.restarts,
        forked_from=pb.ForkPoint(episode_id=fork.episode_id, step_index=fork.step_index) if fork else None,
        try_turns=sample.try_turns,
    )


def _sample_from_proto(message: pb.Sample) -> domain.Sample:
    fork = message.forked_from
    return domain.Sample(
        sample_id=message.sample_id,
        role=message.role,
        outcome=_outcome(message.outcome),
        sequences=_sequences_from_proto(message.sequences),
        temperature=message.temperature,
        reward=message.reward if message.HasField("reward") else None,
        reward_parts=dict(message.reward_parts),
        parent_id=message.parent_id,
        policy=message.policy,
        system=message.system,
        error=message.error,
        text=message.text,
        episode_id=message.episode_id,
        turns=_turns_from_proto(message.turns),
        feedback=message.feedback,
        final_observation=message.final_observation,
        restarts=message.restarts,
        forked_from=domain.ForkPoint(fork.episode_id, fork.step_index) if message.HasField("forked_from") else None,
        try_turns=tuple(message.try_turns),
    )


def _target_to_proto(target: domain.TrainingTarget) -> pb.TrainingTarget:
    return pb.TrainingTarget(
        target_id=target.target_id,
        role=target.role,
        source_id=target.source_id,
        system=target.system,
        sequences=_sequences_to_proto(target.sequences),
    )


def _target_from_proto(message: pb.TrainingTarget) -> domain.TrainingTarget:
    sequences = _sequences_from_proto(message.sequences)
    return domain.TrainingTarget(message.target_id, message.role, message.source_id, sequences, message.system)


def _trained_to_proto(trained: domain.Trained) -> pb.Trained:
    return pb.Trained(
        datum_id=trained.datum_id,
        source_id=trained.source_id,
        sequence=trained.sequence,
        branch=trained.branch,
        objective=trained.objective,
        weight=trained.weight,
        numbers=trained.numbers,
        values={name: pb.TrainedValues(values=values) for name, values in trained.values.items()},
        others=trained.others,
    )


def _trained_from_proto(message: pb.Trained) -> domain.Trained:
    return domain.Trained(
        datum_id=message.datum_id,
        source_id=message.source_id,
        sequence=message.sequence,
        branch=message.branch,
        objective=message.objective,
        weight=message.weight,
        numbers=dict(message.numbers),
        values={name: tuple(array.values) for name, array in message.values.items()},
        others=dict(message.others),
    )


def _fill_parts(message: pb.Experience, experience: domain.Experience) -> None:
    """Fills the fields of ERL's parts from the samples with these roles."""
    for role, field in ((FIRST, message.first_attempt), (SECOND, message.second_attempt)):
        sample = experience.sample(role)
        if sample is not None and sample.is_episode:
            field.CopyFrom(_attempt(sample))
    reflection = experience.sample(REFLECTION)
    if reflection is not None and not reflection.is_episode:
        message.reflection.CopyFrom(_reflection(reflection))
    target = experience.target(DISTILLED)
    if target is not None:
        message.distilled.distilled_id = target.target_id
        message.distilled.source_attempt_id = target.source_id
        message.distilled.sequences.extend(_sequences_to_proto(target.sequences))
        message.distilled.reward = experience.source(target).reward or 0.0


def _attempt(sample: domain.Sample) -> pb.Attempt:
    return pb.Attempt(
        attempt_id=sample.sample_id,
        episode_id=sample.episode_id,
        outcome=outcome_to_proto(sample.outcome),
        reward=sample.reward,
        feedback=sample.feedback,
        turns=_turns_to_proto(sample.turns),
        final_observation=sample.final_observation,
        sequences=_sequences_to_proto(sample.sequences),
        temperature=sample.temperature,
        error=sample.error,
        restarts=sample.restarts,
    )


def _reflection(sample: domain.Sample) -> pb.Reflection:
    return pb.Reflection(
        reflection_id=sample.sample_id,
        text=sample.text,
        sequences=_sequences_to_proto(sample.sequences),
        temperature=sample.temperature,
        outcome=outcome_to_proto(sample.outcome),
        reward=sample.reward,
        error=sample.error,
        policy=sample.policy,
    )


def _samples_of_parts(message: pb.Experience) -> list[domain.Sample]:
    samples = [_sample_of_attempt(message.first_attempt, FIRST, "")]
    if message.HasField("reflection"):
        reflection = message.reflection
        samples.append(
            domain.Sample(
                sample_id=reflection.reflection_id,
                role=REFLECTION,
                outcome=_outcome(reflection.outcome),
                sequences=_sequences_from_proto(reflection.sequences),
                temperature=reflection.temperature,
                reward=reflection.reward if reflection.HasField("reward") else None,
                parent_id=samples[0].sample_id,
                policy=reflection.policy,
                error=reflection.error,
                text=reflection.text,
            )
        )
    if message.HasField("second_attempt"):
        samples.append(_sample_of_attempt(message.second_attempt, SECOND, samples[-1].sample_id))
    return samples


def _sample_of_attempt(attempt: pb.Attempt, role: str, parent_id: str) -> domain.Sample:
    return domain.Sample(
        sample_id=attempt.attempt_id,
        role=role,
        outcome=_outcome(attempt.outcome),
        sequences=_sequences_from_proto(attempt.sequences),
        temperature=attempt.temperature,
        reward=attempt.reward if attempt.HasField("reward") else None,
        parent_id=parent_id,
        error=attempt.error,
        episode_id=attempt.episode_id,
        turns=_turns_from_proto(attempt.turns),
        feedback=attempt.feedback,
        final_observation=attempt.final_observation,
        restarts=attempt.restarts,
    )


def _targets_of_parts(message: pb.Experience) -> list[domain.TrainingTarget]:
    if not message.HasField("distilled"):
        return []
    distilled = message.distilled
    sequences = _sequences_from_proto(distilled.sequences)
    return [domain.TrainingTarget(distilled.distilled_id, DISTILLED, distilled.source_attempt_id, sequences)]


def _outcome(value: int) -> Outcome:
    """Raises ValueError for one that this version does not know."""
    found = outcome_from_proto(value)  # type: ignore[arg-type]
    if found is None:
        raise ValueError(f"an unknown outcome: {value}")
    return found


def _turns_to_proto(turns: Iterable[domain.Turn]) -> list[pb.Turn]:
    return [
        pb.Turn(
            observation=turn.observation,
            text=turn.text,
            action=turn.action,
            reward=turn.reward,
            tool=turn.tool,
            sent=turn.sent,
        )
        for turn in turns
    ]


def _turns_from_proto(turns: Iterable[pb.Turn]) -> tuple[domain.Turn, ...]:
    return tuple(
        domain.Turn(
            turn.observation,
            turn.text,
            turn.action,
            turn.reward,
            turn.tool,
            turn.sent if turn.HasField("sent") else None,
        )
        for turn in turns
    )


def _sequences_to_proto(sequences: Iterable[domain.TokenSequence]) -> list[pb.TokenSequence]:
    return [
        pb.TokenSequence(
            segments=[
                pb.Segment(
                    kind=_KINDS[segment.kind],
                    token_ids=segment.token_ids,
                    log_probs=segment.log_probs,
                    policy_versions=spans_to_proto(segment.policy_versions),
                    loss=segment.loss,
                )
                for segment in sequence.segments
            ]
        )
        for sequence in sequences
    ]


def _sequences_from_proto(sequences: Iterable[pb.TokenSequence]) -> tuple[domain.TokenSequence, ...]:
    return tuple(
        domain.TokenSequence(
            tuple(
                domain.Segment(
                    _KINDS_BACK[segment.kind],
                    tuple(segment.token_ids),
                    tuple(segment.log_probs),
                    spans_from_proto(segment.policy_versions),
                )
                for segment in sequence.segments
            )
        )
        for sequence in sequences
    )
