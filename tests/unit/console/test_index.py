"""The index of experiences: filters, histogram, order, and files that grow or change."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from mulligan.console.histogram import Bin, histogram
from mulligan.console.index import _MOST_RUNS, ExperienceFilter, ExperienceIndex
from mulligan.testing.recorded_runs import write_run, write_step
from mulligan.trainer.journal import journal_file


@pytest.fixture
def index(tmp_path: Path) -> Iterator[ExperienceIndex]:
    found = ExperienceIndex(tmp_path / "cache" / "index.sqlite")
    yield found
    found.close()


def read(index: ExperienceIndex, root: Path, run: str, steps: int) -> list[bool]:
    return [index.add_step(run, step, journal_file(root / run / "journal", step)) for step in range(steps)]


def test_filters(index: ExperienceIndex, tmp_path: Path) -> None:
    write_run(tmp_path, "run", says='the "goal" is B')
    write_run(tmp_path, "other", steps=1)
    assert read(index, tmp_path, "run", 3) == [True] * 3 and read(index, tmp_path, "other", 1) == [True]

    def ids(**wanted: object) -> list[str]:
        found = index.find(ExperienceFilter("run", **wanted))  # type: ignore[arg-type]  # as given
        assert found.count == len(found.rows)
        return [row.experience_id for row in found.rows]

    assert len(ids()) == 12
    assert ids()[0] == "run-s2-t0-r0", "the latest step comes first, its experiences in their order"
    assert ids(step=1, slot=1) == ["run-s1-t1-r0", "run-s1-t1-r1"]
    assert len(ids(role="second")) == 6 and ids(role="secon") == []
    assert len(ids(reward_from=0.5)) == 6 and len(ids(reward_from=0, reward_to=0)) == 6
    assert len(ids(text='"goal" LEG')) == 0 and len(ids(text='"goal" b')) == 6
    assert len(ids(text="fel")) == 12, "the last word may be a beginning"
    assert ids(text="NEAR( ) OR - *") == [], "no word is an operator"
    assert len(ids(outcome="completed", environment="frozenlake-3x3")) == 12 and ids(outcome="error") == []
    assert [row.gain for row in index.find(ExperienceFilter("run", step=0)).rows] == [None, 1.0, None, 1.0]


def test_pages_and_neighbours(index: ExperienceIndex, tmp_path: Path) -> None:
    write_run(tmp_path, "run")
    read(index, tmp_path, "run", 3)
    every = [row.experience_id for row in index.find(ExperienceFilter("run")).rows]
    pages = [index.find(ExperienceFilter("run"), after=after, limit=5) for after in (0, 5, 10, 15)]
    assert [row.experience_id for page in pages for row in page.rows] == every
    assert {page.count for page in pages} == {12}
    failed = ExperienceFilter("run", reward_to=0.0)
    assert index.neighbours(failed, "run-s1-t0-r1") == ("run-s2-t1-r1", "run-s1-t1-r1")
    assert index.neighbours(failed, "run-s2-t0-r1") == (None, "run-s2-t1-r1")
    assert index.neighbours(failed, "nobody") == (None, None)
    assert [index.place(ExperienceFilter("run"), one) for one in every] == list(range(12))
    assert index.place(failed, "run-s1-t0-r1") == 2
    assert index.place(failed, "run-s1-t0-r0") is None, "it has succeeded"
    for before, one, after in zip([None, *every], every, [*every[1:], None], strict=False):
        assert index.neighbours(ExperienceFilter("run"), one) == (before, after)


def test_a_histogram_of_few_and_of_many_rewards(index: ExperienceIndex, tmp_path: Path) -> None:
    write_run(tmp_path, "run")
    read(index, tmp_path, "run", 3)
    assert index.rewards(ExperienceFilter("run")) == [Bin(0.0, 0.0, 6), Bin(1.0, 1.0, 6)]
    assert index.rewards(ExperienceFilter("run"), bins=1) == [Bin(0.0, 1.0, 12)]
    assert index.rewards(ExperienceFilter("nobody")) == []
    assert index.choices("run")["role"] == ["first", "reflection", "second"]


def test_bins_of_many_rewards_have_all_of_them() -> None:
    rewards = [(place * 37 % 1000) / 999 for place in range(1000)]
    found = histogram(rewards)
    assert len(found) == 20 and (found[0].low, round(found[-1].high, 12)) == (0.0, 1.0)
    assert [one.count for one in found] == [50] * 20
    assert all(sum(one.low <= reward < one.high for reward in rewards) in (49, 50, 51) for one in found)
    assert histogram([]) == [] and histogram([0.5]) == [Bin(0.5, 0.5, 1)]


def test_a_page_has_the_bins_of_all_rewards(index: ExperienceIndex, tmp_path: Path) -> None:
    write_run(tmp_path, "run")
    read(index, tmp_path, "run", 3)
    wanted = ExperienceFilter("run", role="first", reward_from=1.0, reward_to=1.0)
    page = index.page(wanted, limit=4)
    assert (page.count, len(page.rows), page.bins) == (6, 4, [Bin(0.0, 0.0, 6), Bin(1.0, 1.0, 6)])
    assert page.rows == index.find(wanted, limit=4).rows
    assert index.page(ExperienceFilter("run", text="legend")).bins == [Bin(0.0, 0.0, 6)]


def test_what_another_process_indexes_is_found(index: ExperienceIndex, tmp_path: Path) -> None:
    """Two consoles may show one folder. A filter has what either wrote, also in place of what it had."""
    folder = write_run(tmp_path, "run", steps=2)
    other = ExperienceIndex(tmp_path / "cache" / "index.sqlite")
    read(other, tmp_path, "run", 1)
    assert index.find(ExperienceFilter("run")).count == 4
    read(other, tmp_path, "run", 2)
    assert index.find(ExperienceFilter("run", text="legend")).count == 4
    file = journal_file(folder.journal, 1)
    file.unlink()
    write_step(folder, "run", 1, groups=3, rollouts=3, says="anew")
    read(other, tmp_path, "run", 2)
    assert [index.find(ExperienceFilter("run", step=step)).count for step in (0, 1)] == [4, 9]
    assert index.find(ExperienceFilter("run", text="anew")).count == 6
    other.close()


def test_facts_of_runs_that_were_looked_at_long_ago_are_read_again(index: ExperienceIndex, tmp_path: Path) -> None:
    runs = [f"run-{number}" for number in range(_MOST_RUNS + 2)]
    for run in runs:
        write_run(tmp_path, run, steps=1)
        read(index, tmp_path, run, 1)
    for run in [*runs, *runs]:
        assert index.find(ExperienceFilter(run)).count == 4
    assert list(index._facts) == runs[2:]


def test_a_file_is_read_again_when_it_has_changed(index: ExperienceIndex, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "run", steps=1)
    assert read(index, tmp_path, "run", 1) == [True]
    assert read(index, tmp_path, "run", 1) == [False]
    file = journal_file(folder.journal, 0)
    file.unlink()
    write_step(folder, "run", 0, groups=3, rollouts=1, says="anew")
    os.utime(file, ns=(1, 1))
    assert read(index, tmp_path, "run", 1) == [True]
    assert index.find(ExperienceFilter("run")).count == 3
    assert index.find(ExperienceFilter("run", text="legend")).count == 0, "its words are gone, too"


def test_a_file_that_is_no_index_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    path.write_bytes(b"something else, longer than a page" * 1_000)
    write_run(tmp_path, "run", steps=1)
    found = ExperienceIndex(path)
    assert read(found, tmp_path, "run", 1) == [True] and found.find(ExperienceFilter("run")).count == 4
    found.close()
    again = ExperienceIndex(path)
    assert read(again, tmp_path, "run", 1) == [False]
    again.close()


def test_an_index_of_another_version_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    with sqlite3.connect(path) as old:
        old.execute("CREATE TABLE experiences (id INTEGER PRIMARY KEY, run TEXT)")
        old.execute("CREATE TABLE files (run TEXT, step INTEGER)")
    write_run(tmp_path, "run", steps=1)
    found = ExperienceIndex(path)
    assert read(found, tmp_path, "run", 1) == [True]
    rows = found.find(ExperienceFilter("run")).rows
    assert [row.rewards for row in rows[:2]] == ["first 1", "first 0 · reflection 1 · second 1"]
    found.close()
