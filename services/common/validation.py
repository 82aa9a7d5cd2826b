"""Checks messages against the constraints in the contracts: protovalidate rules on fields.

A constraint is written once, in the .proto file, where clients in any language can read it. The servers' interceptor
calls `violations` for each request before the servicer sees it; docs/proof/validation.md measures the cost.
protovalidate implements all standard rules and refuses rules that it cannot compile, so none is ignored silently.
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

# Caches compiled rules per message type. Thread-safe.
_validator = protovalidate.Validator()


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One violated constraint: the field and what was expected."""

    field: str
    expected: str

    def __str__(self) -> str:
        return f"{self.field}: {self.expected}" if self.field else self.expected


def violations(message: Message) -> list[FieldViolation]:
    """The first constraint that the message violates, as a list of one; empty for a valid message.

    Checking stops there, so a hostile message with a million bad items costs no more than one with a single bad item.
    """
    found = _validator.collect_violations(message, fail_fast=True)
    return [_translate(violation) for violation in found]


def prepare(service_names: Iterable[str]) -> None:
    """Compiles the rules of all requests of these services, named such as "mulligan.env.v1.EnvService".

    A server calls it at start: a rule that cannot be compiled then stops the server instead of failing requests, and no
    request waits milliseconds for the compilation. Raises ValueError, which names the message type.
    """
    pool = descriptor_pool.Default()
    requests = [method.input_type for name in service_names for method in pool.FindServiceByName(name).methods]
    for descriptor in _reachable(requests):
        try:
            _validator.collect_violations(message_factory.GetMessageClass(descriptor)())
        except protovalidate.CompilationError as error:
            raise ValueError(f"constraints of {descriptor.full_name}: {error}") from error


def _reachable(roots: Iterable[Descriptor]) -> list[Descriptor]:
    """These message types and, recursively, the types of their fields: protovalidate compiles a nested type on first
    use."""
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
    """One element of a path, in the notation of callers: `steps[3]`, `labels["split"]`."""
    subscript = element.subscript
    if subscript is None:
        return element.field_name
    key = f'"{subscript.value}"' if isinstance(subscript.value, str) else str(subscript.value)
    return f"{element.field_name}[{key}]"
