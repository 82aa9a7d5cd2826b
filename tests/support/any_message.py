"""Messages of any type for hypothesis, made from descriptors. A failure is shrunk to the fewest fields that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from tests.support.mutations import BOUNDS, INTEGERS, NUMBERS, TEXTS

_MAX_DEPTH = 4
_WIRE = FieldDescriptor


def any_message(descriptor: Descriptor, plausible: Mapping[str, Sequence[Any]]) -> st.SearchStrategy[Message]:
    """`plausible` has good values by the name of a field, which come often."""
    return _fields(descriptor, plausible, 0).map(lambda values: _filled(descriptor, values))


def _fields(descriptor: Descriptor, plausible: Mapping[str, Sequence[Any]], depth: int) -> st.SearchStrategy[Any]:
    chosen: dict[str, st.SearchStrategy[Any]] = {}
    alternatives: dict[str, list[st.SearchStrategy[Any]]] = {}
    for field in descriptor.fields:
        if depth == _MAX_DEPTH and field.cpp_type == _WIRE.CPPTYPE_MESSAGE:
            continue
        value = _value(field, plausible, depth)
        if field.is_repeated:
            value = st.lists(value, max_size=3)
        oneof = field.containing_oneof
        if oneof is not None and len(oneof.fields) > 1:
            alternatives.setdefault(oneof.name, []).append(st.tuples(st.just(field.name), value))
        else:
            chosen[field.name] = value
    single = st.fixed_dictionaries({}, optional=chosen)
    one_of_each = st.tuples(*(st.none() | st.one_of(values) for values in alternatives.values()))
    return st.tuples(single, one_of_each).map(lambda both: both[0] | dict(pair for pair in both[1] if pair is not None))


def _value(field: FieldDescriptor, plausible: Mapping[str, Sequence[Any]], depth: int) -> st.SearchStrategy[Any]:
    if field.cpp_type == _WIRE.CPPTYPE_MESSAGE:
        assert field.message_type is not None
        within = field.message_type
        return st.deferred(lambda: _fields(within, plausible, depth + 1))
    odd = _scalar(field)
    usual = plausible.get(field.name)
    return st.sampled_from(usual) | odd if usual else odd


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind in (_WIRE.CPPTYPE_DOUBLE, _WIRE.CPPTYPE_FLOAT):
        return st.sampled_from(NUMBERS) | st.floats(width=32)
    if kind == _WIRE.CPPTYPE_BOOL:
        return st.booleans()
    if kind == _WIRE.CPPTYPE_ENUM:
        assert field.enum_type is not None
        return st.sampled_from([*(value.number for value in field.enum_type.values), -1, 99, 2**31 - 1])
    if kind == _WIRE.CPPTYPE_STRING and field.type == _WIRE.TYPE_BYTES:
        return st.binary(max_size=64) | st.sampled_from([text.encode() for text in TEXTS])
    if kind == _WIRE.CPPTYPE_STRING:
        return st.text(max_size=16) | st.sampled_from(TEXTS)
    low, high = BOUNDS[kind]
    return st.integers(low, high) | st.sampled_from([number for number in INTEGERS if low <= number <= high])


def _filled(descriptor: Descriptor, values: Mapping[str, Any]) -> Message:
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if field.name not in values:
            continue
        value = values[field.name]
        if field.cpp_type != _WIRE.CPPTYPE_MESSAGE:
            if field.is_repeated:
                getattr(message, field.name).extend(value)
            else:
                setattr(message, field.name, value)
            continue
        assert field.message_type is not None
        if _is_map(field):
            entries = (_filled(field.message_type, one) for one in value)
            _fill_map(getattr(message, field.name), field.message_type, entries)
        elif field.is_repeated:
            getattr(message, field.name).extend(_filled(field.message_type, one) for one in value)
        else:
            getattr(message, field.name).CopyFrom(_filled(field.message_type, value))
    return message


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _fill_map(target: Any, entry: Descriptor, entries: Any) -> None:
    is_message = entry.fields_by_name["value"].cpp_type == _WIRE.CPPTYPE_MESSAGE
    for one in entries:
        if is_message:
            target[one.key].CopyFrom(one.value)
        else:
            target[one.key] = one.value
