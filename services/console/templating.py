"""The templates of the console's pages and of reports, with what they call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined

from mulligan.cli.out import safe

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


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3g}"


def query(given: Mapping[str, Any], **changes: Any) -> str:
    """A query string: what is given, with changes. None and "" leave a name out."""
    found = {name: value for name, value in {**given, **changes}.items() if value not in (None, "")}
    return f"?{urlencode(found)}" if found else ""
