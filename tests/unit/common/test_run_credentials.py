"""Credentials of runs: what counts, what does not and why, and how keys are replaced."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from mulligan.cli.app import app
from mulligan.common.access import AccessRole
from mulligan.common.channel import Endpoint, UnprotectedToken, check_protection
from mulligan.common.errors import DomainError, Reason
from mulligan.common.run_credentials import BadKeys, BadRunCredential, RunGrant, RunGuard, RunKeys
from mulligan.common.tokens import RUN_CREDENTIAL, KnownTokens, bearer
from tests.support.run_keys import private_pem, public_pem, write_keys
from tests.support.tokens import token_of, write_tokens

GRANT = RunGrant("one", ("one", "environment/maze"))


class Call:
    """The context of a call with this metadata, whose caller has these names in its certificate."""

    def __init__(self, *metadata: tuple[str, str], names: tuple[bytes, ...] = ()):
        self._metadata = metadata
        self._names = names

    def invocation_metadata(self) -> Any:
        return self._metadata

    def auth_context(self) -> Any:
        return {"x509_subject_alternative_name": self._names} if self._names else {}


def replace(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}")
    new.write_bytes(content)
    os.replace(new, path)


def test_who_has_the_public_key_alone_verifies_and_cannot_sign(tmp_path: Path) -> None:
    private, public = map(RunKeys, write_keys(tmp_path))
    credential = private.sign(GRANT, 60)
    assert private.verify(credential) == public.verify(credential) == GRANT
    assert (private.can_sign, public.can_sign) == (True, False)
    with pytest.raises(BadKeys, match="no private key"):
        public.sign(GRANT, 60)


def forged(claims: dict[str, Any], header: dict[str, Any], key: Any = None) -> str:
    if key is not None:
        return jwt.encode(claims, key, headers=header, algorithm=header["alg"])
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in (header, claims)]
    return ".".join([*parts, ""])


def test_what_does_not_count_says_why(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    keys = RunKeys(public)
    good = RunKeys(private).sign(GRANT, 60)
    head, body, signature = good.split(".")
    other = Ed25519PrivateKey.generate()
    key = RunKeys(private)._private
    assert key is not None
    claims = {"iss": "mulligan", "exp": time.time() + 60, "run": "one", "scopes": ["one"]}
    signed = {
        "expired": RunKeys(private).sign(GRANT, -120),
        "not signed by a key": jwt.encode(claims, other, algorithm="EdDSA"),
        "Invalid issuer": jwt.encode(claims | {"iss": "another"}, key, algorithm="EdDSA"),
        'missing the "exp"': jwt.encode({"iss": "mulligan", "run": "one"}, key, algorithm="EdDSA"),
        "not a run and a list": jwt.encode(claims | {"scopes": "one"}, key, algorithm="EdDSA"),
        "longer than": good + "a" * 5000,
    }
    for words, credential in signed.items():
        with pytest.raises(BadRunCredential, match=words):
            keys.verify(credential)
    # The public key as the secret of a symmetric algorithm, and no algorithm at all: https://www.rfc-editor.org/rfc/rfc8725
    secret = b"the public key is no secret, so it signs nothing"
    for credential in (
        forged(claims, {"alg": "none", "typ": "JWT"}),
        forged(claims, {"alg": "HS256", "typ": "JWT"}, secret),
        f"{head}.{body}.{signature[:-4]}AAAA",
        f"{head}.{base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b'=').decode()}.{signature}",
        *("", "a", "a.b.c", "..", "é\x00"),
    ):
        with pytest.raises(BadRunCredential):
            keys.verify(credential)
    assert keys.verify(good) == GRANT


def test_a_key_is_replaced_while_credentials_of_both_count(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    signs, verifies = RunKeys(private), RunKeys(public)
    before = signs.sign(GRANT, 60)
    old_public, new = public.read_bytes(), Ed25519PrivateKey.generate()
    replace(public, old_public + public_pem(new))
    replace(private, private_pem(new) + old_public)
    after = signs.sign(GRANT, 60)
    for keys in (signs, verifies):
        assert keys.verify(before) == keys.verify(after) == GRANT
    replace(public, b"-----BEGIN PUBLIC KEY-----\nhalf of it")
    assert verifies.verify(after) == GRANT, "a file that is wrong changes nothing"
    replace(public, public_pem(new))
    assert verifies.verify(after) == GRANT
    with pytest.raises(BadRunCredential, match="not signed by a key"):
        verifies.verify(before)


def test_a_wrong_file_of_keys_is_named_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "keys.pem"
    with pytest.raises(BadKeys, match=r"keys\.pem: cannot be read: No such file"):
        RunKeys(path)
    curve = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    key = private_pem(Ed25519PrivateKey.generate())
    for content, words in (
        (b"", "holds no key"),
        (curve, "key 1 is not of the kind Ed25519"),
        (key + key.replace(b"MC4C", b"MC4D"), "key 2 cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(BadKeys, match=words) as caught:
            RunKeys(path)
        assert "MC4" not in str(caught.value)


def refusal(guard: RunGuard, call: Call, *, scope: str = "", learner: str = "") -> DomainError | None:
    try:
        if scope:
            guard.check_scopes(call, scope)
        else:
            guard.check_learner(call, learner)
    except DomainError as error:
        return error
    return None


def test_a_caller_needs_the_credential_of_just_this_run(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    guard = RunGuard(RunKeys(public), KnownTokens(write_tokens(tmp_path)))
    mine = Call((RUN_CREDENTIAL, RunKeys(private).sign(GRANT, 60)), *bearer(token_of(AccessRole.ACTOR)))
    assert refusal(guard, mine, scope="one") is refusal(guard, mine, scope="environment/maze") is None
    assert refusal(guard, mine, learner="one") is None and guard.allows_learner(mine, "one")
    for other in (refusal(guard, mine, scope="two"), refusal(guard, mine, learner="two")):
        assert other is not None and "is for the run 'one' and the scope 'one'" in other.message
    assert not guard.allows_learner(mine, "two")
    scopes_alone = Call((RUN_CREDENTIAL, RunKeys(private).sign(RunGrant(scopes=("one",)), 60)))
    assert refusal(guard, scopes_alone, scope="one") is None
    assert refusal(guard, scopes_alone, learner="one") is not None
    for role in (AccessRole.READER, AccessRole.ACTOR, AccessRole.TRAINER):
        without = refusal(guard, Call(*bearer(token_of(role))), scope="one")
        assert without is not None and without.message.endswith("the call has none")
        assert (without.reason, without.metadata) == (Reason.RUN_CREDENTIAL, {"scope": "one"})


def test_administrators_need_no_credential_and_without_keys_nobody_does(tmp_path: Path) -> None:
    _, public = write_keys(tmp_path)
    guard = RunGuard(RunKeys(public), KnownTokens(write_tokens(tmp_path)))
    assert refusal(guard, Call(*bearer(token_of(AccessRole.ADMIN))), scope="one") is None
    assert refusal(guard, Call(names=(b"urn:mulligan:role:admin",)), learner="one") is None
    assert refusal(guard, Call(names=(b"urn:mulligan:role:trainer",)), learner="one") is not None
    assert refusal(RunGuard(RunKeys(public)), Call(*bearer(token_of(AccessRole.ADMIN))), scope="one") is not None
    assert refusal(RunGuard(None, KnownTokens(write_tokens(tmp_path))), Call(), scope="one") is None


def test_a_credential_crosses_no_network_without_tls() -> None:
    with pytest.raises(UnprotectedToken):
        check_protection(Endpoint("memory.example:50053", run_credential="a.b.c"))
    check_protection(Endpoint("127.0.0.1:50053", run_credential="a.b.c"))
    assert "a.b.c" not in repr(Endpoint("127.0.0.1:50053", run_credential="a.b.c"))


def test_the_command_prints_one(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)

    def printed(*words: str) -> RunGrant:
        shown = CliRunner().invoke(app, ["token", "--keys", str(private), *words])
        assert shown.exit_code == 0, shown.output
        return RunKeys(public).verify(shown.output.strip())

    assert printed("--run", "one") == RunGrant("one", ("one",))
    assert printed("--scope", "team", "--scope", "b") == RunGrant("", ("team", "b"))
    assert printed("--run", "one", "--scope", "team") == RunGrant("one", ("one", "team"))
    nothing = CliRunner().invoke(app, ["token", "--keys", str(private)])
    assert nothing.exit_code == 2 and "expected --run" in nothing.output
    cannot = CliRunner().invoke(app, ["token", "--keys", str(public), "--run", "one"])
    assert cannot.exit_code == 2 and "no private key" in cannot.output.replace("\n", " ")
