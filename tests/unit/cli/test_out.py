"""JSON for terminals: nothing in it steers them, and it stays what it was."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from mulligan.cli.out import json_safe
from mulligan.common.text import safe


@given(st.text())
def test_json_stays_json_without_control_characters(text: str) -> None:
    encoded = json.dumps([text], ensure_ascii=False, indent=1)
    shown = json_safe(encoded)
    assert safe(shown) == shown
    assert json.loads(shown) == [text]


def test_control_characters_are_escapes_of_json() -> None:
    assert json_safe('"\x7f\x9b\u202e\U000e0001é🧊\u200d"') == '"\\u007f\\u009b\\u202e\\udb40\\udc01é🧊\u200d"'
