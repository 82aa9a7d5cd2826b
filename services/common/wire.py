"""Converts between protobuf messages of `mulligan.common.v1` and the types of `types.py` and `inference.py`."""

from __future__ import annotations

from collections.abc import Iterable

from mulligan.common import inference, types
from mulligan.common.v1 import experience_pb2, message_pb2, outcome_pb2

_ROLES = {role: message_pb2.Role.Value(f"ROLE_{role.name}") for role in inference.Role}
_ROLES_BACK = {value: key for key, value in _ROLES.items()}
_OUTCOMES = {outcome: outcome_pb2.Outcome.Value(f"OUTCOME_{outcome.name}") for outcome in types.Outcome}
_OUTCOMES_BACK = {value: key for key, value in _OUTCOMES.items()}
_KINDS = {kind: experience_pb2.SegmentKind.Value(f"SEGMENT_KIND_{kind.name}") for kind in types.SegmentKind}
_KINDS_BACK = {value: key for key, value in _KINDS.items()}


def messages_to_proto(messages: Iterable[inference.Message]) -> list[message_pb2.Message]:
    return [
        message_pb2.Message(
            role=_ROLES[message.role],
            content=message.content,
            tool_calls=[message_pb2.ToolCall(name=call.name, arguments=call.arguments) for call in message.tool_calls],
            name=message.name,
        )
        for message in messages
    ]


def messages_from_proto(messages: Iterable[message_pb2.Message]) -> tuple[inference.Message, ...]:
    return tuple(
        inference.Message(
            _ROLES_BACK[message.role],
            message.content,
            tuple(inference.ToolCall(call.name, call.arguments) for call in message.tool_calls),
            message.name,
        )
        for message in messages
    )


def tools_to_proto(tools: Iterable[inference.Tool]) -> list[message_pb2.Tool]:
    return [
        message_pb2.Tool(name=tool.name, description=tool.description, parameters=tool.parameters) for tool in tools
    ]


def tools_from_proto(tools: Iterable[message_pb2.Tool]) -> tuple[inference.Tool, ...]:
    return tuple(inference.Tool(tool.name, tool.description, tool.parameters) for tool in tools)


def outcome_to_proto(outcome: types.Outcome | None) -> outcome_pb2.Outcome.ValueType:
    return outcome_pb2.OUTCOME_UNSPECIFIED if outcome is None else _OUTCOMES[outcome]


def outcome_from_proto(outcome: outcome_pb2.Outcome.ValueType) -> types.Outcome | None:
    return _OUTCOMES_BACK.get(outcome)


def spans_to_proto(spans: Iterable[inference.VersionSpan]) -> list[experience_pb2.VersionSpan]:
    return [
        experience_pb2.VersionSpan(policy_version=span.policy_version, token_count=span.token_count) for span in spans
    ]


def spans_from_proto(spans: Iterable[experience_pb2.VersionSpan]) -> tuple[inference.VersionSpan, ...]:
    return tuple(inference.VersionSpan(span.policy_version, span.token_count) for span in spans)


def sequence_to_proto(sequence: types.TokenSequence) -> experience_pb2.TokenSequence:
    return experience_pb2.TokenSequence(
        segments=[
            experience_pb2.Segment(
                kind=_KINDS[segment.kind],
                token_ids=segment.token_ids,
                log_probs=segment.log_probs,
                policy_versions=spans_to_proto(segment.policy_versions),
                loss=segment.loss,
            )
            for segment in sequence.segments
        ]
    )


def sequence_from_proto(sequence: experience_pb2.TokenSequence) -> types.TokenSequence:
    return types.TokenSequence(
        tuple(
            types.Segment(
                _KINDS_BACK[segment.kind],
                tuple(segment.token_ids),
                tuple(segment.log_probs),
                spans_from_proto(segment.policy_versions),
            )
            for segment in sequence.segments
        )
    )


def attempt_to_proto(attempt: types.Attempt) -> experience_pb2.Attempt:
    return experience_pb2.Attempt(
        attempt_id=attempt.attempt_id,
        episode_id=attempt.episode_id,
        outcome=_OUTCOMES[attempt.outcome],
        reward=attempt.reward,
        feedback=attempt.feedback,
        turns=[
            experience_pb2.Turn(
                observation=turn.observation, text=turn.text, action=turn.action, reward=turn.reward, tool=turn.tool
            )
            for turn in attempt.turns
        ],
        final_observation=attempt.final_observation,
        sequences=[sequence_to_proto(sequence) for sequence in attempt.sequences],
        temperature=attempt.temperature,
        error=attempt.error,
        restarts=attempt.restarts,
    )


def attempt_from_proto(attempt: experience_pb2.Attempt) -> types.Attempt:
    return types.Attempt(
        attempt_id=attempt.attempt_id,
        episode_id=attempt.episode_id,
        outcome=_OUTCOMES_BACK[attempt.outcome],
        reward=attempt.reward if attempt.HasField("reward") else None,
        feedback=attempt.feedback,
        turns=tuple(
            types.Turn(turn.observation, turn.text, turn.action, turn.reward, turn.tool) for turn in attempt.turns
        ),
        final_observation=attempt.final_observation,
        sequences=tuple(sequence_from_proto(sequence) for sequence in attempt.sequences),
        temperature=attempt.temperature,
        error=attempt.error,
        restarts=attempt.restarts,
    )


def reflection_to_proto(reflection: types.Reflection) -> experience_pb2.Reflection:
    return experience_pb2.Reflection(
        reflection_id=reflection.reflection_id,
        text=reflection.text,
        sequences=[sequence_to_proto(sequence) for sequence in reflection.sequences],
        temperature=reflection.temperature,
        outcome=_OUTCOMES[reflection.outcome],
        reward=reflection.reward,
        error=reflection.error,
        policy=reflection.policy,
    )


def reflection_from_proto(reflection: experience_pb2.Reflection) -> types.Reflection:
    return types.Reflection(
        reflection_id=reflection.reflection_id,
        text=reflection.text,
        sequences=tuple(sequence_from_proto(sequence) for sequence in reflection.sequences),
        temperature=reflection.temperature,
        outcome=_OUTCOMES_BACK[reflection.outcome],
        reward=reflection.reward if reflection.HasField("reward") else None,
        error=reflection.error,
        policy=reflection.policy,
    )


def experience_to_proto(experience: types.Experience) -> experience_pb2.Experience:
    message = experience_pb2.Experience(
        experience_id=experience.experience_id,
        run_id=experience.run_id,
        step=experience.step,
        environment=experience.environment,
        task_id=experience.task_id,
        rollout=experience.rollout,
        first_attempt=attempt_to_proto(experience.first_attempt),
        memory_entry_ids=experience.memory_entry_ids,
    )
    if experience.reflection is not None:
        message.reflection.CopyFrom(reflection_to_proto(experience.reflection))
    if experience.second_attempt is not None:
        message.second_attempt.CopyFrom(attempt_to_proto(experience.second_attempt))
    if experience.distilled is not None:
        message.distilled.CopyFrom(
            experience_pb2.DistilledTarget(
                distilled_id=experience.distilled.distilled_id,
                source_attempt_id=experience.distilled.source_attempt_id,
                sequences=[sequence_to_proto(sequence) for sequence in experience.distilled.sequences],
                reward=experience.distilled.reward,
            )
        )
    return message


def experience_from_proto(message: experience_pb2.Experience) -> types.Experience:
    distilled = None
    if message.HasField("distilled"):
        distilled = types.DistilledTarget(
            message.distilled.distilled_id,
            message.distilled.source_attempt_id,
            tuple(sequence_from_proto(sequence) for sequence in message.distilled.sequences),
            message.distilled.reward,
        )
    return types.Experience(
        experience_id=message.experience_id,
        run_id=message.run_id,
        step=message.step,
        environment=message.environment,
        task_id=message.task_id,
        rollout=message.rollout,
        first_attempt=attempt_from_proto(message.first_attempt),
        reflection=reflection_from_proto(message.reflection) if message.HasField("reflection") else None,
        second_attempt=attempt_from_proto(message.second_attempt) if message.HasField("second_attempt") else None,
        distilled=distilled,
        memory_entry_ids=tuple(message.memory_entry_ids),
    )
