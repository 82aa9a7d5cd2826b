"""Text can be read in both themes: contrasts of WCAG 2.2, level AA. https://www.w3.org/TR/WCAG22/#contrast-minimum"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mulligan.console

STYLES = (Path(mulligan.console.__file__).parent / "static" / "console.css").read_text()
BEGIN = {"light": ":root {", "dark": '[data-theme="dark"] {'}
SERIES = [f"s{number}" for number in range(10)]


def colors(theme: str) -> dict[str, str]:
    block = STYLES.partition(BEGIN[theme])[2].partition("}")[0]
    return dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block))


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", BEGIN)
def test_contrasts(theme: str) -> None:
    found = colors(theme)
    pairs = [(text, ground) for text in ("text", "faint", "accent", "good", "bad") for ground in ("ground", "raised")]
    pairs += [("text", soft) for soft in ("accent-soft", "bad-soft", "warn-soft")]
    pairs += [(series, "ground") for series in SERIES]  # names of series are written in their colours
    low = {pair: round(contrast(found[pair[0]], found[pair[1]]), 2) for pair in pairs}
    assert {pair: value for pair, value in low.items() if value < 4.5} == {}
