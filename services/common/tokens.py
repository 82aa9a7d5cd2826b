"""Bearer tokens in files. A file is read again when it has changed, so tokens are replaced while the services run.

A file has one token per line; empty lines and those that begin with # are left out. A caller sends the first token of
its file. A server has a folder with a file for each role, all of whose tokens it accepts. So a token is replaced in
three steps: the new one comes behind the old one in the servers' files, then to the callers, then the old one goes.
https://www.rfc-editor.org/rfc/rfc6750
"""

from __future__ import annotations

import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import structlog

from mulligan.common.access import AccessRole
from mulligan.common.files import stamp
from mulligan.common.suggest import did_you_mean

log = structlog.get_logger()
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,1024}=*")  # RFC 6750, section 2.1, and long enough not to be guessed
_SCHEME = "Bearer "
_LOOK_SECONDS = 1.0  # for which a server takes a token that it knows without another look at the files
RUN_CREDENTIAL = "mulligan-run-credential"  # metadata of a call; `run_credentials.py`


_SENDABLE = re.compile(r"[\x21-\x7e]{1,4096}")


def is_sendable(credential: str) -> bool:
    """Whether metadata of a call may carry it: gRPC fails for other characters, without a status."""
    return _SENDABLE.fullmatch(credential) is not None


class BadTokens(ValueError):
    """A file that cannot be read or holds what is no token. The message names the file, and no token."""


class TokenFile:
    """The tokens of a file. Where it is `optional` and missing, there are none.

    Raises BadTokens if the file is wrong at first. A change that makes it wrong later is logged, and what it held
    before stays in force.
    """

    def __init__(self, path: Path, *, optional: bool = False):
        self._path = path
        self._optional = optional
        self._stamp = stamp(path)
        self._tokens = self._read()

    @property
    def tokens(self) -> tuple[str, ...]:
        seen = stamp(self._path)
        if seen != self._stamp:
            self._stamp = seen
            try:
                self._tokens = self._read()
            except BadTokens as error:
                log.error("the tokens are those from before", cause=str(error))
            else:
                log.info("tokens read again", file=str(self._path), tokens=len(self._tokens))
        return self._tokens

    def _read(self) -> tuple[str, ...]:
        try:
            lines = self._path.read_text().splitlines()
        except FileNotFoundError:
            if self._optional:
                return ()
            raise BadTokens(f"{self._path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadTokens(f"{self._path}: cannot be read: {error}") from error
        tokens = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        for number, token in enumerate(tokens, 1):
            if not _TOKEN.fullmatch(token):
                raise BadTokens(
                    f"{self._path}: token {number}: expected one token per line, of 16 to 1,024 letters, digits and "
                    f"-._~+/, such as `openssl rand -hex 32` prints"
                )
        if not tokens and not self._optional:
            raise BadTokens(f"{self._path}: holds no token")
        return tuple(tokens)


class KnownTokens:
    """The tokens that a server accepts: those in the files `reader`, `actor`, `trainer` and `admin` of a folder.

    Without a folder, those alone that are issued here. A token that was added counts at once, and one that was removed
    is refused within a second. Raises BadTokens if a folder has none, if one has two roles, or if there are other
    files.
    """

    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = time.monotonic):
        self._files: dict[AccessRole, TokenFile] = {}
        self._issued: dict[AccessRole, str] = {}
        self._clock = clock
        self._looked = clock() - _LOOK_SECONDS
        self._digests: list[tuple[AccessRole, bytes]] = []  # of all tokens, when the files were looked at last
        if folder is None:
            return
        _check_names(folder)
        self._files = {role: TokenFile(folder / role, optional=True) for role in AccessRole}
        found = [token for _, token in self._all()]
        if not found:
            raise BadTokens(f"{folder}: holds no token: expected a file for at least one role: {', '.join(AccessRole)}")
        if len(set(found)) < len(found):
            raise BadTokens(f"{folder}: a token stands there twice: expected each once, in the file of its role")

    def issue(self, role: AccessRole) -> str:
        """A token that this process alone has, and accepts as long as it runs."""
        return self._issued.setdefault(role, secrets.token_urlsafe(32))

    def role_of(self, authorization: str) -> AccessRole | None:
        """Of the value of an `authorization` header; None if it has no token that is known here.

        Compares with all tokens, and digests of them, so that the time tells nothing about them.
        """
        given = _digest(authorization.removeprefix(_SCHEME)) if authorization.startswith(_SCHEME) else b""
        if self._clock() - self._looked < _LOOK_SECONDS and (found := self._matching(given)) is not None:
            return found
        self._looked = self._clock()
        self._digests = [(role, _digest(token)) for role, token in self._all()]
        return self._matching(given)

    def _matching(self, given: bytes) -> AccessRole | None:
        found: AccessRole | None = None
        for role, digest in self._digests:
            if hmac.compare_digest(digest, given):
                found = role
        return found

    def _all(self) -> Iterator[tuple[AccessRole, str]]:
        """The lesser roles last: a token that a change put into two files has the lesser role."""
        for role in reversed(AccessRole):
            if role in self._files:
                yield from ((role, token) for token in self._files[role].tokens)
            if role in self._issued:
                yield role, self._issued[role]


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call."""
    return (("authorization", f"{_SCHEME}{token}"),)


def _digest(token: str) -> bytes:
    return sha256(token.encode(errors="surrogateescape")).digest()


def _check_names(folder: Path) -> None:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise BadTokens(f"{folder}: cannot be read: {error.strerror}") from error
    roles = [str(role) for role in AccessRole]
    for name in names:
        if name not in roles and not name.startswith("."):  # Kubernetes keeps the content under such names
            raise BadTokens(f"{folder / name}: no such role{did_you_mean(name, roles)}; there are {', '.join(roles)}")
