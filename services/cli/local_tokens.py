"""The tokens of services that run together on this machine, in files that their user alone can read.

In the services' folder, `tokens` and `env-tokens` have a file for each role. The env service has tokens of its own,
because it runs the code of environments. The files are made once and kept.

This user's other programs find them by the services' addresses. While the services run, there is a file for each
address, such as `~/.local/state/mulligan/services/HOST/127.0.0.1:50051`. Its two lines are the id of the process that
started the services, and the folder of the tokens. That process removes the file before it ends the services, and holds
a lock on it until then. What a killed process left has no lock and is not used, because another user's program may
listen at that address by now.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mulligan.common.access import AccessRole
from mulligan.common.addresses import is_loopback
from mulligan.common.file_lock import lock_file
from mulligan.common.files import replace, temporary_file, user_folder


class NotPrivate(OSError):
    """Another user owns a file or folder of tokens, or may read it. The message names it."""


@dataclass(frozen=True, slots=True)
class LocalTokens:
    """Those in the folder of four services."""

    folder: Path

    def of(self, service: str) -> Path:
        """The folder with the files that a service accepts, one for each role."""
        return self.folder / ("env-tokens" if service == "env" else "tokens")

    def make(self) -> None:
        """Makes what is missing. Raises NotPrivate for what is there and others may read, and OSError."""
        for folder in (self.of("env"), self.of("trainer")):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_private(folder)
            for role in AccessRole:
                file = folder / role
                if not file.exists():
                    replace(file, f"{secrets.token_urlsafe(32)}\n".encode(), 0o600)
                check_private(file)

    def settings(self) -> dict[str, dict[str, Path]]:
        """By service: the settings that name the files."""
        folders = {name: {"tokens_folder": self.of(name)} for name in ("env", "policy", "memory", "trainer")}
        return folders | {
            "trainer": {
                **folders["trainer"],
                "env_token_file": self.of("env") / AccessRole.ACTOR,
                "policy_token_file": self.of("policy") / AccessRole.TRAINER,
                "memory_token_file": self.of("memory") / AccessRole.TRAINER,
            }
        }


def check_private(path: Path) -> None:
    """Raises NotPrivate unless this user owns the file or folder and nobody else may read it; OSError if it is
    missing."""
    _check(path, path.stat())


def _check(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.getuid():
        raise NotPrivate(f"{path}: belongs to another user, so its tokens are not used")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise NotPrivate(f"{path}: other users may use it (mode {mode:o}): expected 700 of a folder, 600 of a file")


@contextmanager
def announced(folders: Mapping[str, Path]) -> Iterator[None]:
    """Lets this user's programs find the folder of tokens of each address, until the end of the block. Raises
    NotPrivate and OSError."""
    with ExitStack() as stack:
        place = _make_place()
        for address, folder in folders.items():
            stack.enter_context(_announced(place / address, folder))
        yield


@contextmanager
def _announced(file: Path, folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        with temporary_file(file.parent, 0o600) as temporary:
            held = stack.enter_context(lock_file(temporary))
            held.write(f"{os.getpid()}\n{folder}\n".encode(errors="surrogateescape"))
            held.flush()
            temporary.replace(file)
        try:
            yield
        finally:
            if file.exists() and os.path.samestat(file.stat(), os.fstat(held.fileno())):  # else it is another's
                file.unlink()


def find_tokens(address: str) -> Path | None:
    """The folder of the tokens of services that run for this user at an address of this machine; None where there are
    none. Raises NotPrivate for a file that others may have written or read."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not host or not is_loopback(host):
        return None
    try:
        file = _place() / address
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    with open(descriptor, "rb") as opened:
        _check(file, os.fstat(descriptor))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # they run
            _, _, folder = opened.read().decode(errors="surrogateescape").partition("\n")
            return Path(folder.removesuffix("\n"))
    return None


def _place() -> Path:
    """Names the machine, because machines may share the home folder. Raises OSError for a user without one."""
    try:
        return user_folder("XDG_STATE_HOME", ".local/state") / "services" / os.uname().nodename
    except RuntimeError as error:
        raise FileNotFoundError(f"this user has no home folder, and XDG_STATE_HOME names none: {error}") from error


def _make_place() -> Path:
    place = _place()
    place.parents[2].mkdir(parents=True, exist_ok=True)
    for folder in (place.parents[1], place.parent, place):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o700)
        check_private(folder)
    return place
