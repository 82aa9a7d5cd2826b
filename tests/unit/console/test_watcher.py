"""Reading what runs write, where one of them writes what cannot be read."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import structlog

from mulligan.console.index import ExperienceIndex
from mulligan.console.library import Library
from mulligan.console.watcher import Watcher
from mulligan.testing.recorded_runs import experience, write_run
from mulligan.trainer.journal import StepJournal
from tests.support.waiting import until


async def test_a_file_that_cannot_be_understood_keeps_no_other_from_being_read(tmp_path: Path) -> None:
    good = write_run(tmp_path / "runs", "good", steps=2)
    bad = write_run(tmp_path / "runs", "bad", steps=2)
    journal = StepJournal(bad.journal, 1)
    one = experience("bad", 1, 0, 0)
    for sample in one.samples:
        journal.add(sample)
    journal.complete(replace(one, experience_id="no number in it"))
    journal.close()
    for folder in (good, bad):
        shutil.copy(folder.journal / "000000.msgpack", folder.journal / "000000 (copy).msgpack")
    index = ExperienceIndex(tmp_path / "index.sqlite")
    watcher = Watcher(Library(tmp_path / "runs"), index)
    with structlog.testing.capture_logs() as logs:
        async with watcher.running():
            await until(lambda: watcher.added == 3 and not watcher.indexing)
            write_run(tmp_path / "runs", "later", steps=1)
            await until(lambda: watcher.added == 4)
    index.close()
    [told] = [entry for entry in logs if entry["event"] == "experiences cannot be read"]
    assert (told["run"], told["step"]) == ("bad", 1)
