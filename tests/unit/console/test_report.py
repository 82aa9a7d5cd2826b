"""Which experiences a report has."""

from __future__ import annotations

from pathlib import Path

import pytest

from mulligan.console.library import Library, ShownRun
from mulligan.console.report import choose
from mulligan.testing.recorded_runs import write_run


def shown(folder: Path, steps: int, groups: int = 2) -> ShownRun:
    """In each group the first rollout succeeds at once, and the second with its second attempt."""
    write_run(folder, "run", steps=steps, groups=groups)
    library = Library(folder)
    library.update()
    return library.runs[0]


@pytest.mark.parametrize(
    ("count", "steps"),
    [(0, []), (1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, list(range(10))), (20, sorted([*range(10)] * 2))],
)
def test_they_are_of_evenly_spaced_steps(tmp_path: Path, count: int, steps: list[int]) -> None:
    chosen = choose(shown(tmp_path, 10), count)
    assert [one.step for one in chosen.experiences] == steps
    assert chosen.count == 40
    assert [(one.low, one.high, one.count) for one in chosen.bins] == [(0.0, 0.0, 20), (1.0, 1.0, 20)]


def test_of_a_step_those_that_gained_most_and_least(tmp_path: Path) -> None:
    chosen = choose(shown(tmp_path, 1, groups=3), 4)
    assert [len(one.samples) for one in chosen.experiences] == [3, 1, 3, 1]


def test_a_step_with_few_is_there_as_a_whole(tmp_path: Path) -> None:
    assert len(choose(shown(tmp_path, 1), 50).experiences) == 4


def test_a_run_without_a_step(tmp_path: Path) -> None:
    chosen = choose(shown(tmp_path, 0), 50)
    assert (chosen.experiences, chosen.count, chosen.bins) == ([], 0, [])
