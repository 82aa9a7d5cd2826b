"""A run that a command finds on this machine's disk, without a server."""

from __future__ import annotations

from pathlib import Path

from mulligan.cli.out import fail
from mulligan.common.suggest import did_you_mean
from mulligan.trainer.folder import run_folders


def found_run(run: str, runs: Path, *, nor: str = "") -> Path:
    """The folder of the run that `run` names: a run's folder, one that has a run in it, or the id of a run in `runs` or
    below. Where it names none or several, the command ends; `nor` says what else such a folder does not have."""
    folder = Path(run)
    found = list(run_folders(folder if folder.is_dir() else runs))
    if folder.is_dir():
        if not found:
            fail(f"{run}: this folder has no run (a run has run.json){nor}", 2)
    else:
        names = [path.name for path in found]
        found = [path for path in found if path.name == run]
        if not found:
            fail(f"{run}: no run below {runs} has this id{did_you_mean(run, names)}", 2)
    if len(found) > 1:
        fail(f"{run} has {len(found)} runs: name one of their folders, such as {found[0]}", 2)
    return found[0].absolute()
