"""Converts between protobuf messages of `mulligan.common.v1` and the types of `types.py` and `inference.py`."""

from __future__ import annotations

from collections.abc import Iterable

from mulligan.common import inference, types
from mulligan.common.v1 import experience_pb2, message_pb2, outcome_pb2

_ROLES = {role: message_pb2.Role.Value(f"ROLE_{role.name}") for role in inference.Role}
_ROLES_BACK = {value: key for key, value in _ROLES.items()}
_OUTCOMES = {outcome: outcome_pb2.Outcome.Value(f"OUTCOME_{outcome.name}") for outcome in types.Outcome}
_OUTCOMES_BACK = {value: key for key, value in _OUTCOMES.items()}


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
