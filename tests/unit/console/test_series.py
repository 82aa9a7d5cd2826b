"""The series of a run, read while it is written."""

from __future__ import annotations

from pathlib import Path

from mulligan.console.charts import first_charts, matching_charts
from mulligan.console.series import NOTICES, RunSeries
from mulligan.testing.recorded_runs import write_run
from mulligan.trainer.events import EvaluationEvent, EventLog, NoticeEvent, StepEvent
from mulligan.trainer.folder import RunFolder


def test_what_is_written_later_is_read_alone(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "run")
    found = RunSeries(folder)
    found.update()
    assert list(found.series["success_first"].steps) == [0, 1, 2]
    assert found.series["evaluation/success"].last == 0.8 and found.state == "completed" and found.steps == 3
    seen = found.cursor
    log = EventLog(folder.events_file)
    log.add(StepEvent(1, {"success_first": 0.5}))  # the step was repeated
    log.add(StepEvent(3, {"success_first": 0.7}))
    log.add(EvaluationEvent(4, 0.9, 0.9, 10, 0, {"turns/success@2": 0.4}, "maze"))
    found.update()
    assert found.series["success_first"].after(seen) == ([1, 3], [0.5, 0.7])
    assert list(found.series["success_first"].values) == [1 / 3, 0.5, 1.0, 0.7]
    assert found.series["maze/evaluation/turns/success@2"].after(0) == ([4], [0.4])
    assert found.series["entropy"].after(seen) == ([], [])


def test_a_line_that_is_being_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log = EventLog(folder.events_file)
    log.add(StepEvent(0, {"entropy": 1.0}))
    log.add(StepEvent(1, {"entropy": 2.0}))
    content = folder.events_file.read_bytes()
    found = RunSeries(folder)
    found.update()  # without the file's second line
    folder.events_file.write_bytes(content[:-5])
    early = RunSeries(folder)
    early.update()
    assert early.series["entropy"].after(0) == ([0], [1.0])
    folder.events_file.write_bytes(content)
    early.update()
    assert early.series["entropy"].after(0) == found.series["entropy"].after(0) == ([0, 1], [1.0, 2.0])


def test_notices_are_bounded(tmp_path: Path) -> None:
    log = EventLog(RunFolder(tmp_path).events_file)
    for number in range(NOTICES + 5):
        log.add(NoticeEvent(str(number)))
    found = RunSeries(RunFolder(tmp_path))
    found.update()
    assert len(found.notices) == NOTICES and found.cursor == NOTICES + 5


def test_the_first_charts_and_those_that_are_searched_for() -> None:
    names = [
        "success_second",
        "success_first",
        "evaluation/success",
        "maze/evaluation/success",
        "pairs/loss",
        "seconds",
    ]
    assert [(chart.title, chart.names) for chart in first_charts(names)] == [
        ("Success on test tasks", ("evaluation/success", "maze/evaluation/success")),
        ("Success in training", ("success_first", "success_second")),
        ("Seconds of a step", ("seconds",)),
    ]
    assert [chart.title for chart in matching_charts(names, " LOSS pairs")] == ["pairs/loss"]
