"""Tool calls: tools described by a JSON schema, and calls parsed in the format of the model's chat template.

A pydantic model defines the arguments of a tool: its schema is shown to the agent, and arguments are validated against
it. Calls are found in the agent's answer in these forms:

    <tool_call>{"name": "search", "arguments": {"query": "…"}}</tool_call>   Hermes, Qwen
    {"name": "search", "parameters": {"query": "…"}}                         Llama 3; the whole answer, fenced or not
    [TOOL_CALLS] [{"name": "search", "arguments": {"query": "…"}}]           Mistral; later [TOOL_CALLS]search[ARGS]{…}
    <function_calls>search(query="…")</function_calls>                       Olmo 3; Llama 4: [search(query="…")]

An answer may be hostile: parsing takes linear time and evaluates nothing. A call that cannot be parsed becomes an error
message for the agent.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mulligan.common.inference import Tool
from mulligan.common.thoughts import without_thoughts

MAX_CALLS = 8  # per answer; further calls are ignored
_MAX_CALL_CHARACTERS = 8_192
_MAX_PROBLEM = 300  # characters of an error message for the agent
_BLOCKS = (("<tool_call>", "</tool_call>"), ("<function_calls>", "</function_calls>"))
_MISTRAL = "[TOOL_CALLS]"
_MISTRAL_ARGUMENTS = "[ARGS]"
_JSON_NAMES = {"null": None, "true": True, "false": False}
_PYTHON_TAG = "<|python_tag|>"  # Llama 3.1 puts it before its JSON
_FENCE = "```"
_FILE_NAME = "<tool call>"
M = TypeVar("M", bound=BaseModel)

# Python would warn about odd syntax in the text of a model.
warnings.filterwarnings("ignore", module=_FILE_NAME)


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `problem` says why it cannot be parsed; `name` may then be incomplete."""

    name: str
    arguments: dict[str, Any]
    problem: str = ""

    def describe(self, limit: int) -> str:
        """One line for a trace. Shows only text and plain numbers."""
        if self.problem:
            return f"unreadable tool call ({self.problem})"
        values = ((key, _plain(value)) for key, value in islice(self.arguments.items(), 10))
        return printable(f"{self.name}({', '.join(f'{key}={value}' for key, value in values)})", limit)


def describe(name: str, arguments: type[BaseModel]) -> Tool:
    """The tool; its description is the docstring of the pydantic model."""
    schema = arguments.model_json_schema()
    for part in (schema, *schema.get("properties", {}).values()):
        part.pop("title", None)
    description = schema.pop("description", "")
    return Tool(name, description, json.dumps(schema, ensure_ascii=False))


def read_arguments(kind: type[M], arguments: dict[str, Any]) -> M:
    """Validates arguments. Raises ValueError with a readable message. A null argument counts as absent: models write
    null for a default."""
    try:
        return kind.model_validate({key: value for key, value in arguments.items() if value is not None})
    except ValidationError as error:
        problems = (": ".join([*map(str, item["loc"]), item["msg"]]) for item in error.errors())
        raise ValueError(printable("; ".join(problems), _MAX_PROBLEM)) from error


def find_calls(answer: str, names: Collection[str]) -> list[Call]:
    """Returns the calls of an answer, in order, outside of its thoughts. `names` are the existing tools: without marks
    around it, JSON or a list that calls none of them is not a call."""
    text = without_thoughts(answer).strip()
    for opening, closing in _BLOCKS:
        if opening in text:
            return _first(call for block in _blocks(text, opening, closing) for call in _read(block))
    if _MISTRAL in text:
        return _first(call for part in text.split(_MISTRAL)[1:] for call in _read_mistral(part))
    bare = _unfenced(text.removeprefix(_PYTHON_TAG).strip())
    if len(bare) > _MAX_CALL_CHARACTERS or not bare.startswith(("{", "[")):
        return []
    return _first(call for call in _read(bare) if call.name in names)


def printable(text: str, limit: int) -> str:
    """One printable line: no line breaks, control characters or lone surrogates, cut at `limit`."""
    cut = text if len(text) <= limit else text[:limit] + "…"
    line = " ".join(cut.split())
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)


def _plain(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    is_short = isinstance(value, bool | float | None) or (isinstance(value, int) and abs(value) < 10**9)
    return str(value) if is_short else "…"


def _first(calls: Iterator[Call]) -> list[Call]:
    return list(islice(calls, MAX_CALLS))


def _blocks(text: str, opening: str, closing: str) -> Iterator[str]:
    """The texts between the marks. The last one may lack its end mark, if the model stopped there."""
    for part in text.split(opening)[1:]:
        yield part.partition(closing)[0]


def _unfenced(text: str) -> str:
    """Unwraps an answer that is a single fenced block, such as ```json … ```; other text is returned unchanged."""
    if not (text.startswith(_FENCE) and text.endswith(_FENCE) and len(text) > 2 * len(_FENCE)):
        return text
    first_line, _, rest = text[len(_FENCE) : -len(_FENCE)].partition("\n")
    return (rest if first_line.strip().isalnum() else first_line + "\n" + rest).strip()


def _read(block: str) -> Iterator[Call]:
    text = block.strip()
    if not text:
        yield Call("", {}, "the call is empty")
    elif len(text) > _MAX_CALL_CHARACTERS:
        yield Call("", {}, f"the call is longer than {_MAX_CALL_CHARACTERS} characters")
    elif text.startswith(("{", '["', "[{")) or text.replace(" ", "").startswith("[{"):
        yield from _read_json(text)
    else:
        yield from _read_python(text)


def _read_mistral(part: str) -> Iterator[Call]:
    """Parses a list of calls, or a name with its arguments."""
    name, has_name, arguments = part.partition(_MISTRAL_ARGUMENTS)
    if has_name and len(name) < _MAX_PROBLEM:
        part = f'{{"name": {json.dumps(name.strip())}, "arguments": {arguments.strip()}}}'
    yield from _read(part)


def _read_json(text: str) -> Iterator[Call]:
    try:
        found, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        yield Call("", {}, f"the call is not valid JSON: {printable(str(error), _MAX_PROBLEM)}")
        return
    for item in found if isinstance(found, list) else [found]:
        yield _from_json(item)


def _from_json(item: object) -> Call:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return Call("", {}, 'the call is not a JSON object with "name" and "arguments"')
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the arguments as a string that holds JSON
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        return Call(item["name"], {}, '"arguments" is not a JSON object')
    return Call(item["name"], arguments)


def _read_python(text: str) -> Iterator[Call]:
    """Parses Python calls with literal keyword arguments. Never runs them."""
    try:
        nodes = _expressions(ast.parse(text, _FILE_NAME))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield Call("", {}, 'the call is neither JSON nor of the form name(argument="value")')
        return
    for node in nodes:
        yield _from_python(node)


def _expressions(module: ast.Module) -> Sequence[ast.AST]:
    found: list[ast.AST] = []
    for statement in module.body:
        value = statement.value if isinstance(statement, ast.Expr) else statement
        found += value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
    return found


class _JsonNames(ast.NodeTransformer):
    """Replaces null, true and false, which Olmo writes among Python literals."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node


def _from_python(node: ast.AST) -> Call:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return Call("", {}, 'the call is neither JSON nor of the form name(argument="value")')
    name = node.func.id
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        return Call(name, {}, "arguments must be given by name")
    try:
        values = {str(keyword.arg): _JsonNames().visit(keyword.value) for keyword in node.keywords}
        return Call(name, {argument: ast.literal_eval(value) for argument, value in values.items()})
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return Call(name, {}, "arguments must be literal values")
