"""Requests that a stranger may send: valid ones of any message type, with values and bytes that are not."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

_MAX_DEPTH = 6
_WIRE = FieldDescriptor
_DEEP_JSON = "[" * 200_000
TEXTS = (
    "",
    "\x00",
    "é🧊",
    "x" * 300,
    "x" * 70_000,
    "../../escape",
    "%s%n{}",
    "-1/0",
    "9" * 5_000 + "/1",
    "9" * 5_000,
    "٣/٣",
    "upload:///0",
    "file:///etc/passwd",
    "file://[",
    "{" * 50,
    _DEEP_JSON,
    base64.urlsafe_b64encode(_DEEP_JSON.encode()).decode(),
    base64.urlsafe_b64encode(json.dumps([2**63 - 1, "0" * 16]).encode()).decode(),
    base64.urlsafe_b64encode(b"[1e400, NaN]").decode(),
)
INTEGERS = (0, 1, 2, 7, 1_000, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, -1, -(2**31), -(2**63))
NUMBERS = (0.0, -0.0, 1.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"))
BOUNDS = {
    _WIRE.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    _WIRE.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    _WIRE.CPPTYPE_UINT32: (0, 2**32 - 1),
    _WIRE.CPPTYPE_UINT64: (0, 2**64 - 1),
}


class Mutations:
    """`plausible` has good values by the name of a field, where those are not to be guessed; a field that has none is
    left out of half of the good requests. Equal seeds give equal requests."""

    def __init__(self, seed: object, plausible: Mapping[str, Sequence[Any]]):
        self._random = random.Random(str(seed))
        self._plausible = plausible

    def message(self, descriptor: Descriptor, oddness: float = 0.0, depth: int = 0) -> Message:
        """Every field of it, each odd with this probability."""
        message = message_factory.GetMessageClass(descriptor)()
        chosen = {oneof.name: self._random.choice(list(oneof.fields)).name for oneof in descriptor.oneofs}
        for field in descriptor.fields:
            alternative = field.containing_oneof
            if alternative is not None and chosen[alternative.name] != field.name:
                continue
            usual = self._plausible.get(field.name)
            may_lack = field.has_presence and (alternative is None or len(alternative.fields) == 1)
            if self._random.random() < (oddness / 2 + 0.5 if may_lack or usual == () else oddness / 2):
                continue  # left out
            self._fill(message, field, oddness, depth)
        return message

    def _fill(self, message: Message, field: FieldDescriptor, oddness: float, depth: int) -> None:
        entry = field.message_type if field.message_type and field.message_type.GetOptions().map_entry else None
        if entry is not None:
            for _ in range(self._random.randrange(3)):
                key = self._value(entry.fields_by_name["key"], oddness)
                if entry.fields_by_name["value"].message_type is None:
                    getattr(message, field.name)[key] = self._value(entry.fields_by_name["value"], oddness)
        elif field.message_type is not None:
            count = 1 + self._random.randrange(2) if field.is_repeated else 1
            for _ in range(count if depth < _MAX_DEPTH else 0):
                target = getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name)
                target.CopyFrom(self.message(field.message_type, oddness, depth + 1))
        elif field.is_repeated:
            count = self._random.choice((1, 2, 3, 70)) if self._random.random() < oddness else 2
            getattr(message, field.name).extend(self._value(field, oddness) for _ in range(count))
        else:
            setattr(message, field.name, self._value(field, oddness))

    def _value(self, field: FieldDescriptor, oddness: float) -> Any:
        odd = self._random.random() < oddness
        if self._plausible.get(field.name) and not odd:
            return self._random.choice(self._plausible[field.name])
        kind = field.cpp_type
        if kind in (_WIRE.CPPTYPE_DOUBLE, _WIRE.CPPTYPE_FLOAT):
            return self._random.choice(NUMBERS) if odd else 0.5
        if kind == _WIRE.CPPTYPE_BOOL:
            return self._random.random() < 0.5
        if kind == _WIRE.CPPTYPE_ENUM:
            assert field.enum_type is not None
            known = [value.number for value in field.enum_type.values]
            return self._random.choice([*known, -1, 99, 2**31 - 1] if odd else known)
        if kind == _WIRE.CPPTYPE_STRING:
            text = self._random.choice(TEXTS) if odd else "text"
            return text.encode() if field.type == _WIRE.TYPE_BYTES else text
        low, high = BOUNDS[kind]
        return min(max(self._random.choice(INTEGERS), low), high) if odd else self._random.randrange(1, 4)

    def serialized(self, descriptor: Descriptor) -> bytes:
        """Of a message that is valid, odd, or damaged."""
        message = self.message(descriptor, self._random.choice((0.0, 0.1, 0.3, 0.9)))
        content = message.SerializeToString()
        return self._damaged(content) if self._random.random() < 0.6 else content

    def _damaged(self, content: bytes) -> bytes:
        place = self._random.randrange(len(content) + 1)
        noise = self._random.randbytes(self._random.choice((1, 2, 8, 100)))
        return self._random.choice(
            (
                content[:place],
                content[:place] + noise + content[place:],
                content[:place] + noise + content[place + len(noise) :],
                content[place:] + content[:place],
                noise,
                b"\x0a\x04\xff\xfe\xed\xa0" + content,  # text that is not UTF-8, as field 1
                b"\x0a\xff\x7f" * 5_000,  # field 1 within field 1, and so on
                content + b"\x0b" * 200,  # groups that are never closed
            )
        )
