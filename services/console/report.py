"""A run as one HTML file that can be mailed: charts, experiences and settings, with all that it needs inside.

It opens without a server and asks nobody for anything: its Content-Security-Policy allows its own scripts alone, by
their hashes (https://www.w3.org/TR/CSP3/#grammardef-hash-source).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from markupsafe import Markup

from mulligan.common.experience import Experience
from mulligan.console.charts import first_charts, matching_charts
from mulligan.console.histogram import Bin, histogram
from mulligan.console.index import ExperienceRow, row_of
from mulligan.console.library import ShownRun
from mulligan.console.settings import flat
from mulligan.console.templating import STATIC, templates
from mulligan.console.tokens import texts_of
from mulligan.console.views import view_of
from mulligan.trainer.journal import journal_file, journaled_steps, read_experiences

_SCRIPTS = ("theme.js", "vendor/uplot-1.6.32.min.js", "charts.js", "keys.js")
_STYLES = ("vendor/uplot-1.6.32.min.css", "console.css")
_MODULES = {"charts.js", "keys.js"}  # run when the page is read; the others at once


@dataclass(frozen=True, slots=True)
class Script:
    text: Markup
    is_module: bool
    sha256: str  # in base64, as the policy wants it


@dataclass(frozen=True, slots=True)
class Chosen:
    """The experiences of a report, and of all of the run how many there are and the rewards of their first samples."""

    experiences: Sequence[Experience]
    count: int
    bins: Sequence[Bin]


def report(run: ShownRun, count: int, *, tokens: bool) -> str:
    """The HTML of a run's report with at most so many experiences; with `tokens` each token of theirs."""
    chosen = choose(run, count)
    names = set(run.series.series)
    first = first_charts(names)
    shown_first = {name for chart in first for name in chart.names}
    source = str(run.setting("model", "source") or "")
    texts = texts_of(source) if tokens else None
    scripts = [_script(name) for name in _SCRIPTS]
    return (
        templates()
        .get_template("report.html")
        .render(
            run=run,
            first=first,
            others=matching_charts(names - shown_first, ""),
            series=_embedded(_points(run)),
            rows=[row_of(run.key, one) for one in chosen.experiences],
            hrefs=[f"#e{number}" for number, _ in enumerate(chosen.experiences, 1)],
            views=[view_of(one, texts) for one in chosen.experiences],
            with_tokens=tokens,
            chosen=chosen,
            settings={} if run.record is None else flat(run.record.settings),
            styles=Markup("\n".join((STATIC / name).read_text() for name in _STYLES)),
            scripts=scripts,
            policy="; ".join(_policy(scripts)),
            written=datetime.now(UTC),
        )
    )


def choose(run: ShownRun, count: int) -> Chosen:
    """From evenly spaced steps those that gained most from the first attempt to the last, and those that gained least;
    of equal gains, the greatest and the least rewards. They are in the order of the journal."""
    steps = journaled_steps(run.folder.journal)
    spaced = _spaced(steps, count)
    each = max(1, count // max(1, len(spaced)))
    found: list[Experience] = []
    rewards: list[float] = []
    total = 0
    for step in steps:
        experiences = read_experiences(journal_file(run.folder.journal, step))
        rows = [row_of(run.key, one) for one in experiences]
        total += len(rows)
        rewards += [row.reward for row in rows if row.reward is not None]
        if step in spaced:
            found += [experiences[index] for index in _telling(rows, each)]
    return Chosen(found[:count], total, histogram(rewards))


def _spaced(steps: Sequence[int], count: int) -> set[int]:
    if count >= len(steps):
        return set(steps)
    return {steps[round(place * (len(steps) - 1) / max(1, count - 1))] for place in range(count)}


def _telling(rows: Sequence[ExperienceRow], count: int) -> list[int]:
    def place(index: int) -> tuple[float, float, int]:
        return -(rows[index].gain or 0.0), -(rows[index].reward or 0.0), index

    order = sorted(range(len(rows)), key=place)
    most = (count + 1) // 2
    return sorted({*order[:most], *order[max(most, len(order) - (count - most)) :]})


def _points(run: ShownRun) -> dict[str, object]:
    metrics = {name: one.after(0) for name, one in run.series.series.items()}
    return {run.key: {"after": run.series.cursor, "metrics": metrics}}


def _embedded(value: object) -> Markup:
    """JSON within a script element: nothing in it ends the element, or begins a comment."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _script(name: str) -> Script:
    text = (STATIC / name).read_text()
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(Markup(text), name in _MODULES, digest)


def _policy(scripts: Sequence[Script]) -> Iterator[str]:
    yield "default-src 'none'"
    yield "script-src " + " ".join(f"'sha256-{script.sha256}'" for script in scripts)
    yield "style-src 'unsafe-inline'"
    yield "base-uri 'none'"
    yield "form-action 'none'"
