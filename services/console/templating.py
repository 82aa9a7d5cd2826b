"""The templates of the console's pages and of reports, with what they call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined

from mulligan.common.text import safe
from mulligan.console.reading import number, signed

STATIC = Path(__file__).parent / "static"


def templates() -> Environment:
    found = Environment(
        loader=PackageLoader("mulligan.console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"safe_text": safe, "number": number, "signed": signed}
    found.globals |= {"query": query}
    return found


def query(given: Mapping[str, Any], **changes: Any) -> str:
    """A query string: what is given, with changes. None and "" leave a name out."""
    found = {name: value for name, value in {**given, **changes}.items() if value not in (None, "")}
    return f"?{urlencode(found)}" if found else ""
