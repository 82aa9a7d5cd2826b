"""What the list of runs shows of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mulligan.console.library import ShownRun
from mulligan.console.series import RunSeries
from mulligan.trainer.events import EventLog, StepEvent
from mulligan.trainer.folder import RunFolder


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([{"success_second": 1.0, "success_first": 0.25}], 0.25),
        ([{"success_play": 0.5, "success_again": 1.0}, {"success_play": 0.75}], 0.75),
        ([{"success_hinted": 1.0}, {"success_first": 0.5}], 0.5),
        ([{"quiz/success_first": 1.0, "success_play": 0.5}], 0.5),
        ([{"rollouts": 2.0}], None),
        ([], None),
    ],
)
def test_success_in_training_is_that_of_the_first_role(
    tmp_path: Path, steps: list[dict[str, float]], expected: float | None
) -> None:
    folder = RunFolder(tmp_path)
    log = EventLog(folder.events_file)
    for step, metrics in enumerate(steps):
        log.add(StepEvent(step, metrics))
    run = ShownRun("run", folder, RunSeries(folder))
    run.series.update()
    assert run.in_training == expected
