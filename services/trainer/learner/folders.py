"""The folders that a learner's server writes to: whose they are, and who may read them."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path

from mulligan.common.file_lock import lock_file
from mulligan.common.files import make_folder, open_to_group
from mulligan.trainer.learner.settings import LearnerServerSettings

_LOCK = ".trainer.lock"


def claim(settings: LearnerServerSettings) -> ExitStack:
    """Makes the folders for weights and checkpoints, and keeps other trainers out of them until the result is closed or
    the process ends. With `weights_access = "group"` the group of the weights folder may read it.

    Raises OSError, whose message names the setting, where a folder is in use, cannot be used, or where its group cannot
    reach it.
    """
    with ExitStack() as held:
        claimed = set()
        for name, folder in (
            ("weights_folder", settings.weights_folder),
            ("checkpoint_folder", settings.checkpoint_folder),
        ):
            try:
                make_folder(folder)
                if folder.resolve() not in claimed:
                    held.enter_context(lock_file(folder / _LOCK))
                claimed.add(folder.resolve())
            except BlockingIOError:
                raise OSError(
                    f"{name}: {folder} is in use by another trainer, which would delete or replace files of this one: "
                    "give each trainer a folder of its own"
                ) from None
            except OSError as error:
                raise OSError(f"{name}: cannot use {folder}: {error}") from error
        if settings.weights_access == "group":
            _open(settings.weights_folder.resolve())
        return held.pop_all()


def _open(folder: Path) -> None:
    """Opens the folder to its group. Raises OSError where that cannot be, or the group cannot get there."""
    if folder.stat().st_uid == os.geteuid():
        open_to_group(folder)
    if not any(folder.stat().st_mode & bits == bits for bits in (0o050, 0o005)):
        raise OSError(f"weights_access: its group cannot read {folder}, which another user owns: chmod g+rxs it")
    for parent in folder.parents:
        mode = stat.S_IMODE(parent.stat().st_mode)
        if not mode & 0o011:
            raise OSError(
                f"weights_access: the group of {folder} cannot enter {parent} (mode {mode:04o}): chmod g+x it, or set "
                "weights_folder to a place that the group can reach"
            )
