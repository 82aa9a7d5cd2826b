"""The checker against contracts made here on the spot: it is tested on every kind of rule that contracts use."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from mulligan.common.buf import validate_pb2
from mulligan.common.validation import FieldViolation, prepare, violations

Field = descriptor_pb2.FieldDescriptorProto
FileBuilder = Callable[[descriptor_pb2.FileDescriptorProto], None]
_numbers = itertools.count()


def declare(build: FileBuilder) -> str:
    """Adds a contract to the descriptor pool and returns its package, which is new each time."""
    package = f"mulligan_test_validation.v{next(_numbers)}"
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto", package=package, syntax="proto3", dependency=["buf/validate/validate.proto"]
    )
    build(file)
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    return package


def message_class(full_name: str) -> Callable[..., Message]:
    return message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(full_name))


def add_field(message: descriptor_pb2.DescriptorProto, name: str, kind: int, **options: Any) -> validate_pb2.FieldRules:
    """Adds a field with the next free number and returns its rules, to be filled in."""
    options.setdefault("label", Field.LABEL_OPTIONAL)
    field = message.field.add(name=name, number=len(message.field) + 1, type=kind, **options)
    rules = field.options.Extensions[validate_pb2.field]
    assert isinstance(rules, validate_pb2.FieldRules)
    return rules


def _steps(file: descriptor_pb2.FileDescriptorProto) -> None:
    """Fields as StepEpisodes and Generate have them."""
    file.enum_type.add(name="Role").value.add(name="ROLE_UNSPECIFIED", number=0)
    file.enum_type[0].value.add(name="ROLE_USER", number=1)

    step = file.message_type.add(name="Step")
    rules = add_field(step, "episode_id", Field.TYPE_STRING)
    rules.string.min_len = 1
    rules.string.max_len = 8
    add_field(step, "step_index", Field.TYPE_INT32).int32.gte = 0
    rules = add_field(step, "role", Field.TYPE_ENUM, type_name=f".{file.package}.Role")
    rules.enum.defined_only = True
    rules.enum.not_in.append(0)
    step.oneof_decl.add(name="action").options.Extensions[validate_pb2.oneof].required = True
    add_field(step, "text", Field.TYPE_STRING, oneof_index=0).string.max_bytes = 16
    add_field(step, "raw", Field.TYPE_BYTES, oneof_index=0).bytes.max_len = 16

    request = file.message_type.add(name="Request")
    rules = add_field(
        request, "steps", Field.TYPE_MESSAGE, label=Field.LABEL_REPEATED, type_name=f".{file.package}.Step"
    )
    rules.repeated.min_items = 1
    rules.repeated.max_items = 4
    rules = add_field(request, "ids", Field.TYPE_INT32, label=Field.LABEL_REPEATED)
    rules.repeated.max_items = 4
    rules.repeated.items.int32.gte = 0
    request.oneof_decl.add(name="_temperature")
    rules = add_field(request, "temperature", Field.TYPE_DOUBLE, oneof_index=0, proto3_optional=True)
    rules.double.gte = 0
    rules.double.lte = 10
    rules.double.finite = True


PACKAGE = declare(_steps)
Step = message_class(f"{PACKAGE}.Step")
Request = message_class(f"{PACKAGE}.Request")


def step(**changes: Any) -> Message:
    return Step(**({"episode_id": "run/1", "step_index": 0, "role": 1, "text": "Up"} | changes))


@pytest.mark.parametrize(
    "message",
    [
        step(),
        step(episode_id="x" * 8, step_index=2**31 - 1),
        step(text=""),
        Request(steps=[step()] * 4, ids=[0, 5], temperature=0.0),
        Request(steps=[step()]),
    ],
)
def test_a_message_within_its_constraints_has_no_violation(message: Message) -> None:
    assert violations(message) == []


@pytest.mark.parametrize(
    ("message", "field", "expected"),
    [
        (step(episode_id=""), "episode_id", "at least 1"),
        (step(episode_id="x" * 9), "episode_id", "at most 8"),
        (step(step_index=-1), "step_index", "greater than or equal to 0"),
        (step(role=0), "role", "must not be in list [0]"),
        (step(role=7), "role", "defined enum values"),
        (Step(episode_id="a", role=1), "action", "exactly one field"),
        (step(text="é" * 9), "text", "at most 16 bytes"),
        (Step(episode_id="a", role=1, raw=bytes(17)), "raw", "at most 16 bytes"),
        (Request(), "steps", "at least 1"),
        (Request(steps=[step()] * 5), "steps", "no more than 4"),
        (Request(steps=[step(), step(step_index=-1)]), "steps[1].step_index", "greater than or equal to 0"),
        (Request(steps=[step()], ids=[1, 2, -3]), "ids[2]", "greater than or equal to 0"),
        (Request(steps=[step()], temperature=-0.5), "temperature", "greater than or equal to 0"),
        (Request(steps=[step()], temperature=float("nan")), "temperature", ""),
    ],
)
def test_a_violation_names_the_field_and_what_was_expected(message: Message, field: str, expected: str) -> None:
    (violation,) = violations(message)
    assert violation.field == field
    assert expected in violation.expected


def test_a_violation_reads_as_one_line() -> None:
    assert str(FieldViolation("steps[1].step_index", "must be 0")) == "steps[1].step_index: must be 0"
    assert str(FieldViolation("", "must hold together")) == "must hold together"


@given(
    ids=st.lists(st.text(max_size=10), max_size=6),
    indices=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6),
    temperature=st.none() | st.floats(),
)
def test_it_agrees_with_the_constraints_written_by_hand(
    ids: list[str], indices: list[int], temperature: float | None
) -> None:
    request = Request(
        steps=[step(episode_id=i, step_index=n) for i, n in zip(ids, indices, strict=False)], temperature=temperature
    )
    valid = (
        1 <= len(ids) <= 4
        and all(1 <= len(i) <= 8 for i in ids)
        and all(n >= 0 for _, n in zip(ids, indices, strict=False))
        and (temperature is None or 0 <= temperature <= 10)
    )
    assert (violations(request) == []) == valid


def _service(file: descriptor_pb2.FileDescriptorProto, request: str) -> None:
    method = file.service.add(name="TestService").method.add(name="Call")
    method.input_type = method.output_type = f".{file.package}.{request}"


def _unknown_rule(rules: validate_pb2.FieldRules) -> None:
    rules.string.MergeFromString(b"\x98\x3e\x01")  # Field 995 of StringRules, which no version of the rules has.


def _rule_of_another_type(rules: validate_pb2.FieldRules) -> None:
    rules.int32.gte = 3


def _bad_pattern(rules: validate_pb2.FieldRules) -> None:
    rules.string.pattern = "((("


@pytest.mark.parametrize("spoil", [_unknown_rule, _rule_of_another_type, _bad_pattern])
def test_a_rule_that_cannot_be_checked_stops_the_server_at_its_start(
    spoil: Callable[[validate_pb2.FieldRules], None],
) -> None:
    """Even in a nested type, which the engine itself would only look at when a request contains one."""

    def build(file: descriptor_pb2.FileDescriptorProto) -> None:
        spoil(add_field(file.message_type.add(name="Inner"), "text", Field.TYPE_STRING))
        outer = file.message_type.add(name="Outer")
        add_field(outer, "inner", Field.TYPE_MESSAGE, type_name=f".{file.package}.Inner")
        add_field(outer, "again", Field.TYPE_MESSAGE, type_name=f".{file.package}.Outer")
        _service(file, "Outer")

    package = declare(build)
    with pytest.raises(ValueError, match=rf"constraints of {package}\.Inner"):
        prepare([f"{package}.TestService"])


def test_services_with_sound_rules_are_prepared() -> None:
    def build(file: descriptor_pb2.FileDescriptorProto) -> None:
        _steps(file)
        _service(file, "Request")

    package = declare(build)
    prepare([f"{package}.TestService"])
    (violation,) = violations(message_class(f"{package}.Request")())
    assert violation.field == "steps"


def test_an_unknown_service_is_refused() -> None:
    with pytest.raises(KeyError, match="NoSuchService"):
        prepare(["mulligan.env.v1.NoSuchService"])
