"""Checks messages against the constraints that the contracts state: protovalidate rules on the fields.

A constraint is written once, in the .proto file, where clients in any language can read it. The servers' interceptor
calls `violations` on each request before the servicer sees it; what that costs is in docs/proof/validation.md. The
engine implements the complete standard rule set and refuses rules that it cannot compile, so none is ignored silently.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import protovalidate
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

if TYPE_CHECKING:
    from protovalidate import FieldPathElementPb

# Compiled rules are kept per message type inside; calls from several threads are safe.
_validator = protovalidate.Validator()


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One broken constraint: where, and what was expected there."""

    field: str
    expected: str

    def __str__(self) -> str:
        return f"{self.field}: {self.expected}" if self.field else self.expected


def violations(message: Message) -> list[FieldViolation]:
    """The first constraint that the message breaks, as a list of one; empty for a valid message.

    It stops at the first: a hostile message with a million broken items costs no more than one with a single one.
    """
    found = _validator.collect_violations(message, fail_fast=True)
    return [_translate(violation) for violation in found]


def prepare(service_names: Iterable[str]) -> None:
    """Compiles the rules of all requests of these services, given by full name such as "mulligan.env.v1.EnvService".

    Called when a server starts, so that a rule which cannot be compiled stops it there instead of failing a request,
    and no request waits for the compilation (milliseconds). Raises `ValueError` that names the message.
    """
    pool = descriptor_pool.Default()
    requests = [method.input_type for name in service_names for method in pool.FindServiceByName(name).methods]
    for descriptor in _reachable(requests):
        try:
            _validator.collect_violations(message_factory.GetMessageClass(descriptor)())
        except protovalidate.CompilationError as error:
            raise ValueError(f"constraints of {descriptor.full_name}: {error}") from error


def _reachable(roots: Iterable[Descriptor]) -> list[Descriptor]:
    """The message types and all types of their fields: the engine compiles a nested type only when it meets one."""
    seen: dict[str, Descriptor] = {}
    waiting = list(roots)
    while waiting:
        descriptor = waiting.pop()
        if descriptor.full_name not in seen:
            seen[descriptor.full_name] = descriptor
            waiting += [field.message_type for field in descriptor.fields if field.message_type is not None]
    return list(seen.values())


def _translate(violation: protovalidate.Violation) -> FieldViolation:
    path = violation.proto.field
    elements = path.elements if path is not None else []
    return FieldViolation(field=".".join(_step(element) for element in elements), expected=violation.proto.message)


def _step(element: FieldPathElementPb) -> str:
    """One step of a path, as a caller would write it: `steps[3]`, `labels["split"]`."""
    subscript = element.subscript
    if subscript is None:
        return element.field_name
    key = f'"{subscript.value}"' if isinstance(subscript.value, str) else str(subscript.value)
    return f"{element.field_name}[{key}]"
