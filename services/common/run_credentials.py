"""Credentials of runs: who may write to a memory scope, who may use a learner, and who may stop a run.

A role token says what kind of call its holder may make. A run's credential says in which scope, and on which run.
It is a signed JSON Web Token (https://www.rfc-editor.org/rfc/rfc7519, EdDSA of https://www.rfc-editor.org/rfc/rfc8037)
with the run's id, the names of scopes and an end. The trainer has the private key. The memory service and other
trainers have the public one: they verify a credential by themselves, and can issue none.

A file of keys has PEM blocks. All of them verify; the first private one signs. So a key is replaced in three steps: the
new public key comes behind the old one wherever credentials are verified, then the new private key comes first where
they are signed, then the old one goes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from mulligan.common.access import AccessRole, role_of_names
from mulligan.common.errors import DomainError, Reason
from mulligan.common.files import stamp
from mulligan.common.tokens import RUN_CREDENTIAL, KnownTokens

log = structlog.get_logger()
OWN_SECONDS = 600.0  # of a credential that a trainer signs for one call of its own
_ISSUER = "mulligan"
_ALGORITHM = "EdDSA"
_LEEWAY_SECONDS = 60.0  # between the clocks of two machines
_LONGEST = 4096  # characters
_BLOCK = re.compile(rb"-----BEGIN ([A-Z ]+)-----.+?-----END \1-----", re.DOTALL)
_HOW = "`openssl genpkey -algorithm ed25519` makes a private one, `openssl pkey -pubout` its public one"


class BadKeys(ValueError):
    """A file that cannot be read or holds what is no key. The message names the file, and no key."""


class BadRunCredential(Exception):
    """A credential that counts for nothing here; the message says why."""


@dataclass(frozen=True, slots=True)
class RunGrant:
    """What a credential allows: to act upon the run and the learner with its id, and to write to these scopes of a
    memory. Either may be empty."""

    run_id: str = ""
    scopes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"the run {self.run_id!r}"] if self.run_id else []
        parts += [f"the scope {scope!r}" for scope in self.scopes]
        return " and ".join(parts) or "nothing"


class RunKeys:
    """The keys of a file, which is read again when it has changed.

    Raises BadKeys if the file is wrong at first. A change that makes it wrong later is logged, and what it held before
    stays in force.
    """

    def __init__(self, path: Path):
        self._path = path
        self._stamp = stamp(path)
        self._private, self._public = self._read()

    @property
    def can_sign(self) -> bool:
        self._refresh()
        return self._private is not None

    def sign(self, grant: RunGrant, seconds: float) -> str:
        """A credential that counts for so many seconds. Raises BadKeys without a private key."""
        self._refresh()
        if self._private is None:
            raise BadKeys(f"{self._path}: holds no private key, so it signs nothing; {_HOW}")
        claims = {"iss": _ISSUER, "exp": time.time() + seconds, "run": grant.run_id, "scopes": list(grant.scopes)}
        return jwt.encode(claims, self._private, algorithm=_ALGORITHM)

    def verify(self, credential: str) -> RunGrant:
        """What it allows. Raises BadRunCredential."""
        self._refresh()
        if len(credential) > _LONGEST:
            raise BadRunCredential(f"it is longer than {_LONGEST} characters")
        for key in self._public:
            try:
                claims = jwt.decode(
                    credential,
                    key,
                    algorithms=[_ALGORITHM],
                    issuer=_ISSUER,
                    leeway=_LEEWAY_SECONDS,
                    options={"require": ["exp", "iss"]},
                )
            except jwt.InvalidSignatureError:
                continue
            except jwt.ExpiredSignatureError:
                raise BadRunCredential("it has expired") from None
            except jwt.InvalidTokenError as error:
                raise BadRunCredential(f"it cannot be read: {error}") from error
            return _grant(claims)
        raise BadRunCredential("it was not signed by a key of this server")

    def _refresh(self) -> None:
        seen = stamp(self._path)
        if seen == self._stamp:
            return
        self._stamp = seen
        try:
            self._private, self._public = self._read()
        except BadKeys as error:
            log.error("the keys of runs are those from before", cause=str(error))
        else:
            log.info("keys of runs read again", file=str(self._path), keys=len(self._public))

    def _read(self) -> tuple[Ed25519PrivateKey | None, tuple[Ed25519PublicKey, ...]]:
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise BadKeys(f"{self._path}: cannot be read: {error.strerror}") from error
        keys = list(self._keys(content))
        if not keys:
            raise BadKeys(f"{self._path}: holds no key in PEM form; {_HOW}")
        private = next((key for key in keys if isinstance(key, Ed25519PrivateKey)), None)
        return private, tuple(key.public_key() if isinstance(key, Ed25519PrivateKey) else key for key in keys)

    def _keys(self, content: bytes) -> Iterator[Ed25519PrivateKey | Ed25519PublicKey]:
        for number, block in enumerate(_BLOCK.finditer(content), 1):
            key: object
            try:
                private = b"PRIVATE" in block[1]
                key = load_pem_private_key(block[0], None) if private else load_pem_public_key(block[0])
            except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it needs a password
                raise BadKeys(f"{self._path}: key {number} cannot be read; {_HOW}") from None
            if not isinstance(key, Ed25519PrivateKey | Ed25519PublicKey):
                raise BadKeys(f"{self._path}: key {number} is not of the kind Ed25519; {_HOW}")
            yield key


def _grant(claims: dict[str, Any]) -> RunGrant:
    run_id = claims.get("run", "")
    scopes = claims.get("scopes", [])
    if not (isinstance(run_id, str) and isinstance(scopes, list) and all(isinstance(one, str) for one in scopes)):
        raise BadRunCredential("its claims are not a run and a list of scopes")
    return RunGrant(run_id, tuple(scopes))


class RunGuard:
    """Refuses writes by callers without the run's credential.

    Without `keys`, nothing is refused. An administrator by `tokens`, or by its certificate, needs no credential.
    """

    def __init__(self, keys: RunKeys | None = None, tokens: KnownTokens | None = None):
        self._keys = keys
        self._tokens = tokens

    @property
    def is_set(self) -> bool:
        """Whether it refuses anything."""
        return self._keys is not None

    def may_start_runs(self, context: Any) -> bool:
        """Whether the caller's role may start runs. Everybody may where callers have no roles."""
        if self._tokens is None:
            return True
        metadata = dict(context.invocation_metadata() or ())
        roles = self._roles(context, str(metadata.get("authorization", "")))
        return any(role.includes(AccessRole.TRAINER) for role in roles)

    def check_scopes(self, context: Any, *scopes: str, why: str = "") -> None:
        """Raises DomainError RUN_CREDENTIAL unless the caller may write to these scopes of the memory. The message ends
        with `why`."""
        for scope in scopes:
            if problem := self._problem(context, RunGrant(scopes=(scope,))):
                message = (
                    f"writes to the scope {scope!r} need a credential for it, as `{RUN_CREDENTIAL}`: {problem}{why}"
                )
                raise DomainError(Reason.RUN_CREDENTIAL, message, scope=scope)

    def check_learner(self, context: Any, learner_id: str, *, why: str = "") -> None:
        """Raises DomainError RUN_CREDENTIAL unless the caller may use the learner. The message ends with `why`."""
        if problem := self._problem(context, RunGrant(run_id=learner_id)):
            needed = f"the learner {learner_id!r} needs the credential of its run, as `{RUN_CREDENTIAL}`"
            message = f"{needed}: {problem}{why}"
            raise DomainError(Reason.RUN_CREDENTIAL, message, learner_id=learner_id)

    def check_run(self, context: Any, run_id: str) -> None:
        """Raises DomainError RUN_CREDENTIAL unless the caller may act upon the run."""
        if problem := self._problem(context, RunGrant(run_id=run_id)):
            message = f"the run {run_id!r} needs its credential, as `{RUN_CREDENTIAL}`: {problem}"
            raise DomainError(Reason.RUN_CREDENTIAL, message, run_id=run_id)

    def allows_scope(self, context: Any, scope: str) -> bool:
        return not self._problem(context, RunGrant(scopes=(scope,)))

    def allows_learner(self, context: Any, learner_id: str) -> bool:
        """Whether the caller has the credential of the run with this id."""
        return not self._problem(context, RunGrant(run_id=learner_id))

    def _problem(self, context: Any, needed: RunGrant) -> str:
        """Why the caller may not do what needs this grant; empty if it may."""
        if self._keys is None:
            return ""
        metadata = dict(context.invocation_metadata() or ())
        if AccessRole.ADMIN in self._roles(context, str(metadata.get("authorization", ""))):
            return ""
        credential = str(metadata.get(RUN_CREDENTIAL, ""))
        if not credential:
            return "the call has none"
        try:
            grant = self._keys.verify(credential)
        except BadRunCredential as error:
            return f"that of the call does not count: {error}"
        covers = needed.run_id in ("", grant.run_id) and set(needed.scopes) <= set(grant.scopes)
        return "" if covers else f"that of the call is for {grant}"

    def _roles(self, context: Any, authorization: str) -> set[AccessRole]:
        """By the certificate, and by the token."""
        names = context.auth_context().get("x509_subject_alternative_name", ())
        certified = role_of_names(name.decode(errors="replace") for name in names)
        by_token = self._tokens.role_of(authorization) if self._tokens is not None else None
        return {role for role in (certified, by_token) if role is not None}
