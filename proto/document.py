"""Writes docs/contracts.md from the .proto files, and the table of roles in docs/security.md; `make proto` runs it.

Everything in it comes from the descriptors and their comments: services, calls, errors, messages, fields with their
constraints, enums. What v1 may change is in compatibility.md, which goes in front; how errors travel in errors.md. The
roles are those of `services/common/access.py`.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, duration_pb2
from google.rpc import code_pb2
from grpc_tools import protoc

from mulligan.common.access import ACCESS, AccessRole
from mulligan.common.buf import validate_pb2

PROTO = Path(__file__).resolve().parent
PAGE = PROTO.parent / "docs" / "contracts.md"
SECURITY = PROTO.parent / "docs" / "security.md"
PROMISE = PROTO / "compatibility.md"
ERRORS = PROTO / "errors.md"
COMMON = "mulligan.common.v1"

Field = descriptor_pb2.FieldDescriptorProto
Message = descriptor_pb2.DescriptorProto
Enum = descriptor_pb2.EnumDescriptorProto

_SCALARS = {number: name.removeprefix("TYPE_").lower() for name, number in Field.Type.items()}


@dataclass(frozen=True)
class Source:
    """One .proto file, and the comments before what it declares."""

    file: descriptor_pb2.FileDescriptorProto
    comments: Mapping[tuple[int, ...], str]

    def comment(self, *path: int) -> str:
        """Empty where there is none."""
        return self.comments.get(path, "")


def sources() -> list[Source]:
    """The contracts, without what they import from elsewhere; the common messages last."""
    files = sorted(str(path.relative_to(PROTO)) for path in (PROTO / "mulligan").rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "contracts.binpb"
        includes = [f"-I{PROTO}", f"-I{resources.files('grpc_tools') / '_proto'}"]
        if protoc.main(["protoc", *includes, f"--descriptor_set_out={out}", "--include_source_info", *files]) != 0:
            raise SystemExit("protoc failed; its message is above")
        found = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    by_package = sorted(found, key=lambda file: (file.package == COMMON, file.package, file.name))
    return [Source(file, _comments(file)) for file in by_package]


def _comments(file: descriptor_pb2.FileDescriptorProto) -> dict[tuple[int, ...], str]:
    return {tuple(place.path): _unindented(place.leading_comments) for place in file.source_code_info.location}


def _unindented(comment: str) -> str:
    return "\n".join(line.strip() for line in comment.splitlines()).strip()


# --- constraints -----------------------------------------------------------------------------------------------------

_UNITS = {"string": "characters", "bytes": "bytes", "repeated": "items", "map": "pairs"}
_LEAST = ("min_len", "min_items", "min_pairs")
_MOST = ("max_len", "max_items", "max_pairs")


def constraints(field: Field) -> list[str]:
    """In words. Raises where there is one that this program does not know: none is left out in silence."""
    if not field.options.HasExtension(validate_pb2.field):
        return []
    return _rules(field.options.Extensions[validate_pb2.field])


def _rules(rules: Any) -> list[str]:
    words: list[str] = []
    for descriptor, value in rules.ListFields():
        if descriptor.name == "required":
            words.append("required")
        elif descriptor.message_type is None:
            raise NotImplementedError(f"the constraint {descriptor.full_name} has no words yet")
        else:
            words += _typed(descriptor.name, {field.name: item for field, item in value.ListFields()}, value)
    return words


def _typed(kind: str, rules: dict[str, Any], message: Any) -> list[str]:
    """Of the rules for one type, such as `int32` or `string`."""
    words: list[str] = []
    least = next((rules.pop(name) for name in _LEAST if name in rules), None)
    most = next((rules.pop(name) for name in _MOST if name in rules), None)
    if least is not None or most is not None:
        words.append(_between(least, most, _UNITS[kind]))
    if "max_bytes" in rules:
        words.append(f"at most {rules.pop('max_bytes'):,} bytes")
    lower = next((name for name in ("gte", "gt") if name in rules), "")
    upper = next((name for name in ("lte", "lt") if name in rules), "")
    if lower or upper:
        signs = {"gte": "≥", "gt": ">", "lte": "≤", "lt": "<"}
        words.append(" and ".join(f"{signs[name]} {_value(rules.pop(name))}" for name in (lower, upper) if name))
    if rules.pop("defined_only", False):
        words.append("a defined value")
    if "not_in" in rules:
        words.append("not " + ", ".join(map(_value, rules.pop("not_in"))))
    if "in" in rules:
        words.append("one of " + ", ".join(map(_value, rules.pop("in"))))
    if rules.pop("finite", False):
        words.append("finite")
    if rules.pop("unique", False):
        words.append("none twice")
    if "pattern" in rules:
        words.append(f"matches `{rules.pop('pattern')}`".replace("|", "\\|"))
    for name, label in (("items", "each"), ("keys", "each key"), ("values", "each value")):
        if name in rules:
            words.append(f"{label}: " + ", ".join(_rules(rules.pop(name))))
    if rules:
        raise NotImplementedError(f"the constraints {sorted(rules)} of {message.DESCRIPTOR.name} have no words yet")
    return words


def _between(least: int | None, most: int | None, unit: str) -> str:
    if least is not None and most is not None:
        return f"{least:,} {unit}" if least == most else f"{least:,} to {most:,} {unit}"
    return f"at most {most:,} {unit}" if least is None else f"at least {least:,} {unit}"


def _value(value: Any) -> str:
    if isinstance(value, duration_pb2.Duration):
        return f"{value.ToTimedelta().total_seconds():g} s"
    return f"`{value}`" if isinstance(value, str) else f"{value:,}"


# --- errors ----------------------------------------------------------------------------------------------------------

_CAPITALS = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*\b")
_CODES = frozenset(code_pb2.Code.keys())


def reasons(comment: str, known: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(status code, reason) pairs that a comment names: a reason follows the code that it comes with. `known` are words
    in capitals that are something else: names of enum values."""
    code = ""
    for word in _CAPITALS.findall(comment):
        if word in _CODES:
            code = word
        elif word in known:
            code = ""
        elif code and "_" in word:
            yield code, word


def enum_words(files: Iterable[Source]) -> frozenset[str]:
    """Names of enum values, with and without their prefixes."""
    names = {value.name for source in files for enum in _enums(source) for value in enum.value}
    ends = {name[index + 1 :] for name in names for index, letter in enumerate(name) if letter == "_"}
    return frozenset(names | ends)


def _enums(source: Source) -> Iterator[Enum]:
    yield from source.file.enum_type
    for message in source.file.message_type:
        yield from message.enum_type


def _error_table(files: list[Source]) -> Iterator[str]:
    known = enum_words(files)
    of_fields = {
        f".{source.file.package}.{message.name}": [source.comment(4, index, 2, at) for at in range(len(message.field))]
        for source in files
        for index, message in enumerate(source.file.message_type)
    }
    where: dict[tuple[str, str], set[str]] = {}
    for source in files:
        for index, service in enumerate(source.file.service):
            comments = {f"all of {service.name}": [source.comment(6, index)]}
            for at, method in enumerate(service.method):
                comments[method.name] = [source.comment(6, index, 2, at), *of_fields.get(method.input_type, [])]
            for name, texts in comments.items():
                for pair in (pair for text in texts for pair in reasons(text, known)):
                    where.setdefault(pair, set()).add(name)
    yield "| status | reason | calls |\n|---|---|---|"
    for (code, reason), names in sorted(where.items()):
        yield f"| {code} | {reason} | {', '.join(sorted(names))} |"


# --- the page --------------------------------------------------------------------------------------------------------


def page(files: list[Source]) -> str:
    """The whole document, in Markdown."""
    parts = ["<!-- Written by proto/document.py; `make proto` writes it. Not edited by hand. -->"]
    parts += ["# Contracts", PROMISE.read_text().strip(), "## Services"]
    parts += ["\n".join(_overview(files)), "## Errors"]
    parts += [ERRORS.read_text().strip()]
    parts += ["\n".join(_error_table(files))]
    package = ""
    for source in files:
        if source.file.package != package:
            package = source.file.package
            parts.append(f"## {package}")
        parts += [*_services(source), *_messages(source), *_enumerations(source)]
    return "\n\n".join(parts) + "\n"


def _overview(files: list[Source]) -> Iterator[str]:
    yield "| service | calls |\n|---|---|"
    for source in files:
        for service in source.file.service:
            calls = ", ".join(method.name for method in service.method)
            yield f"| {_link(f'{source.file.package}.{service.name}')} | {calls} |"


def _services(source: Source) -> Iterator[str]:
    for index, service in enumerate(source.file.service):
        yield f"### {source.file.package}.{service.name}"
        yield from _text(source.comment(6, index))
        for place, method in enumerate(service.method):
            stream = "stream of " if method.server_streaming else ""
            upload = "stream of " if method.client_streaming else ""
            yield f"#### {service.name}.{method.name}"
            yield f"{upload}{_link(method.input_type[1:])} → {stream}{_link(method.output_type[1:])}"
            yield from _text(source.comment(6, index, 2, place))


def _messages(source: Source) -> Iterator[str]:
    for index, message in enumerate(source.file.message_type):
        yield from _message(source, message, source.file.package, (4, index))


def _message(source: Source, message: Message, scope: str, path: tuple[int, ...]) -> Iterator[str]:
    name = f"{scope}.{message.name}"
    yield f"### {name}"
    yield from _text(source.comment(*path))
    if message.field:
        rows = [_row(source, message, index, path) for index in range(len(message.field))]
        yield "\n".join(["| # | field | type | meaning |\n|---|---|---|---|", *rows])
    else:
        yield "No fields."
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message(source, nested, name, (*path, 3, index))


def _row(source: Source, message: Message, index: int, path: tuple[int, ...]) -> str:
    field = message.field[index]
    notes = constraints(field)
    if field.HasField("oneof_index") and not field.proto3_optional:
        notes.insert(0, f"one of `{message.oneof_decl[field.oneof_index].name}`")
    meaning = " ".join(source.comment(*path, 2, index).split())
    limits = f"*{'; '.join(notes)}*" if notes else ""
    cells = (str(field.number), f"`{field.name}`", _type(message, field), " ".join(filter(None, (meaning, limits))))
    return "| " + " | ".join(cells) + " |"


def _type(message: Message, field: Field) -> str:
    entry = next((nested for nested in message.nested_type if field.type_name.endswith(f".{nested.name}")), None)
    if entry is not None and entry.options.map_entry:
        return f"map of {_plain(entry.field[0])} to {_plain(entry.field[1])}"
    if field.label == Field.LABEL_REPEATED:
        return f"repeated {_plain(field)}"
    return f"optional {_plain(field)}" if field.proto3_optional else _plain(field)


def _plain(field: Field) -> str:
    return _link(field.type_name[1:]) if field.type_name else _SCALARS[field.type]


def _enumerations(source: Source) -> Iterator[str]:
    for index, enum in enumerate(source.file.enum_type):
        yield f"### {source.file.package}.{enum.name}"
        yield from _text(source.comment(5, index))
        rows = [
            f"| {value.number} | `{value.name}` | {' '.join(source.comment(5, index, 2, place).split())} |"
            for place, value in enumerate(enum.value)
        ]
        yield "\n".join(["| # | value | meaning |\n|---|---|---|", *rows])


def _text(comment: str) -> Iterator[str]:
    if comment:
        yield comment


def _link(name: str) -> str:
    """To the heading that has the full name; well-known types have none here."""
    short = name.rpartition(".")[2]
    return f"[{short}](#{name.replace('.', '').lower()})" if name.startswith("mulligan.") else f"`{name}`"


# --- roles -----------------------------------------------------------------------------------------------------------

_TABLE = re.compile(r"(<!-- Roles, written by proto/document.py -->\n).*(<!-- End of roles -->\n)", re.DOTALL)


def with_roles(text: str) -> str:
    """The page on security, its table of roles written anew. Raises SystemExit if it has no place for one."""
    table = "\n".join(_role_table())
    written, places = _TABLE.subn(lambda match: f"{match[1]}{table}\n{match[2]}", text)
    if places != 1:
        raise SystemExit(f"docs/security.md: expected one place for the table of roles, not {places}")
    return written


def _role_table() -> Iterator[str]:
    columns = (None, *AccessRole)
    yield f"| service | {' | '.join(role or 'anyone' for role in columns)} |"
    yield "|---|" + "---|" * len(columns)
    for service, calls in ACCESS.items():
        cells = [", ".join(call for call, needed in calls.items() if needed is role) for role in columns]
        yield f"| {service.rpartition('.')[2]} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/contracts.md and the roles in docs/security.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if one of them is not fresh")
    check: bool = parser.parse_args().check
    for path, text in ((PAGE, page(sources())), (SECURITY, with_roles(SECURITY.read_text()))):
        if not check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"docs/{path.name} is not fresh; run `make proto`")


if __name__ == "__main__":
    main()
