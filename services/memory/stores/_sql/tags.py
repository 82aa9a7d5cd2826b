"""Tags in one column: each is a JSON string in a line of its own. JSON strings have no line breaks, so a tag is there
if and only if its line is."""

from __future__ import annotations

import json
from collections.abc import Iterable


def written(tags: Iterable[str]) -> str:
    lines = [json.dumps(tag) for tag in tags]
    return "\n".join(["", *lines, ""]) if lines else ""


def read(column: str) -> tuple[str, ...]:
    return tuple(json.loads(line) for line in column.splitlines() if line)
