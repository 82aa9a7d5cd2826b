"""What the browser of experiences makes of text: filters that people type, folded lines, columns."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mulligan.common.text import safe
from mulligan.common.types import Outcome
from mulligan.console.index import ExperienceFilter, ExperienceRow
from mulligan.console.terminal.layout import laid_experience, laid_group
from mulligan.console.terminal.rows import row_text
from mulligan.console.terminal.text import fitted, folded
from mulligan.console.terminal.words import BadFilter, typed_of, wanted_by
from mulligan.console.views import view_of
from mulligan.testing.recorded_runs import experience


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("", ExperienceFilter("run")),
        ("fell into", ExperienceFilter("run", text="fell into")),
        ("step=3 slot=0", ExperienceFilter("run", step=3, slot=0)),
        (
            "role=first  legend from=-0.5 to=1",
            ExperienceFilter("run", role="first", reward_from=-0.5, reward_to=1.0, text="legend"),
        ),
        ('environment="a b" outcome=env_error', ExperienceFilter("run", environment="a b", outcome="env_error")),
        ('"x=1" text=y', ExperienceFilter("run", text="x=1 y")),
    ],
)
def test_filters_as_people_type_them(typed: str, wanted: ExperienceFilter) -> None:
    assert wanted_by("run", typed) == wanted
    assert wanted_by("run", typed_of(wanted)) == wanted


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("rol=first", "no filter is named 'rol'; did you mean 'role'?"),
        ("reward_of_it=1", "there are step, slot, role, outcome, environment, from, to, text"),
        ("step=x", "step=x: expected a whole number from 0"),
        ("step=-1", "step=-1: expected"),
        ("step=99999999999999999999", "expected a whole number"),
        ("from=much", "from=much: expected a number"),
        ("to=nan", "to=nan: expected a number"),
        ("step=1 step=2", "step is given twice"),
        ("role= legend", "role= has no value"),
    ],
)
def test_bad_filters_say_what_was_expected(typed: str, says: str) -> None:
    with pytest.raises(BadFilter) as raised:
        wanted_by("run", typed)
    assert says in str(raised.value)


@given(st.text(max_size=200), st.integers(2, 40))
def test_folded_lines_fit_and_lose_nothing(text: str, width: int) -> None:
    lines = list(folded(text, width))
    assert all(cell_len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == safe(text).expandtabs(4).replace("\n", "").replace(" ", "")
    assert all(one.isprintable() or one in "\u200c\u200d" for line in lines for one in line)


@given(st.text(alphabet="ab 日本é", max_size=30), st.integers(1, 20))
def test_fitted_text_has_exactly_its_width(text: str, width: int) -> None:
    assert cell_len(fitted(text, width)) == width


@pytest.mark.parametrize("width", [38, 58, 78, 98, 118, 198])
@pytest.mark.parametrize("several", [False, True])
def test_rows_fit_any_width(width: int, several: bool) -> None:
    ends = (1, 1, 1)
    row = ExperienceRow(
        "run",
        123,
        0,
        0,
        "run-s123-t0-r0",
        "lake",
        "train/1",
        "erl",
        "",
        "first 0 · second 1",
        "completed",
        0.0,
        1.0,
        *ends,
    )
    shown = row_text(row, width, several=several).plain
    assert cell_len(shown) <= width and "  123 train/1" in shown and "0 · " in shown and shown.rstrip().count("1") > 1


def test_long_prompts_are_shortened_until_asked_for() -> None:
    one = experience("run", 0, 0, 1)
    prompt = "\n".join(f"rule {number}" for number in range(9))
    view = view_of(replace(one, samples=(replace(one.samples[0], system=prompt), *one.samples[1:])), None)
    short, whole = (
        [line.plain.strip() for line in laid_experience(view, 80, whole=every).lines] for every in (False, True)
    )
    assert "rule 2" in short and "rule 3" not in short and "… 6 more lines: o" in short
    assert "rule 8" in whole and not any("more lines" in line for line in whole)


def test_all_of_an_experience_is_shown() -> None:
    one = experience("run", 4, 0, 1, says="try [b]Up[/b]")
    failed = replace(one.samples[0], outcome=Outcome.ENV_ERROR, error="the server is away", feedback="", reward=None)
    samples = (failed, *one.samples[1:])
    told = replace(
        one, samples=samples, memory_entry_ids=("m1", "m2"), memory_left_out_id="m3", untrained=("too_long",)
    )
    laid = laid_experience(view_of(told, None), 100, whole=True)
    shown = "\n".join(line.plain for line in laid.lines)
    for text in (
        "frozenlake-3x3 · task train/00000 · erl · step 4 · rollout 1",
        "shown from the memory: m1, m2",
        "left out, to see what it is worth: m3",
        "env_error",
        "the server is away",
        "try [b]Up[/b]",
        "→ Up",
        "A   D   D",
        "reward 1 · version 3 · temperature 1",
        "not trained: too_long",
    ):
        assert text in shown, text
    assert len(laid.starts) == 3 and len(laid.failing) == 1
    assert [laid.lines[place].plain.split()[0] for place in laid.starts] == ["first", "reflection", "second"]


def test_groups_stand_side_by_side_as_far_as_the_width_allows() -> None:
    views = [view_of(experience("run", 0, 0, rollout), None) for rollout in range(5)]
    assert [laid_group(views, width).columns for width in (38, 73, 74, 112, 198, 400)] == [1, 1, 2, 3, 5, 5]
    group = laid_group(views, 112)
    assert [band.members for band in group.bands] == [range(3), range(3, 5)]
    assert len(group.laid.starts) == 5 and {cell_len(line.plain) for line in group.laid.lines} <= {0, 72, 74, 112, 110}
