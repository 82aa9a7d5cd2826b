"""The credentials of the runs that this user started, kept so that later commands can stop, resume and evaluate them.

There is a file for each run, such as `~/.local/state/mulligan/run-credentials/HOST/127.0.0.1:50054/my-run`, that
its user alone can read. A credential goes to no other address than the one that it came from.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from mulligan.cli.connection import RUN_CREDENTIAL
from mulligan.cli.local_tokens import check_private
from mulligan.cli.out import fail, note
from mulligan.common.files import replace, user_folder
from mulligan.common.tokens import is_sendable
from mulligan.trainer.client import RunClient


def keep_credential(client: RunClient, trainer: str, run_id: str) -> None:
    """Writes down the credential that the trainer gave for the run, if it gave one. Says so where it cannot: the run
    goes on."""
    if credential := client.credentials.get(run_id):
        try:
            _write(trainer, run_id, credential)
        except OSError as error:
            note(f"the credential of the run was not kept: {error}")


def _write(trainer: str, run_id: str, credential: str) -> None:
    file = _file(trainer, run_id)
    file.parents[3].mkdir(parents=True, exist_ok=True)
    for folder in (file.parents[2], file.parents[1], file.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
        check_private(folder)
    replace(file, f"{credential}\n".encode(), 0o600)


def recall_credential(client: RunClient, trainer: str, run_id: str) -> None:
    """Gives the client the credential that was kept of the run, if there is one. That of the variable is in its place
    where it is set. Ends the program for a file that others may read or may have written."""
    try:
        if credential := kept_credential(trainer, run_id):
            client.credentials[run_id] = credential
    except OSError as error:
        fail(f"{error}; {RUN_CREDENTIAL} may have another")


def kept_credential(trainer: str, run_id: str) -> str:
    """Empty if none was kept, and where the variable has one. Raises NotPrivate and OSError."""
    if os.environ.get(RUN_CREDENTIAL):
        return ""
    try:
        file = _file(trainer, run_id)
        for path in (file.parent, file):
            check_private(path)
    except FileNotFoundError:
        return ""
    credential = file.read_text("ascii", errors="replace").strip()
    if not is_sendable(credential):
        raise OSError(f"{file} holds no credential of a run: remove it")
    return credential


def _file(trainer: str, run_id: str) -> Path:
    """Names this machine, because machines may share the home folder. Raises FileNotFoundError for a user without
    one."""
    try:
        folder = user_folder("XDG_STATE_HOME", ".local/state") / "run-credentials"
    except RuntimeError as error:
        raise FileNotFoundError(f"this user has no home folder, and XDG_STATE_HOME names none: {error}") from error
    return folder / os.uname().nodename / _name(trainer) / _name(run_id)


def _name(text: str) -> str:
    """As the name of one file, which is not hidden and is no folder above."""
    quoted = quote(text, safe=":")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted
