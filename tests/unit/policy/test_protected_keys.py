"""Keys go to other machines over TLS alone, whatever client sends them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import SecretStr, ValidationError

from mulligan.common.errors import DomainError, Reason
from mulligan.common.http_keys import key_problem
from mulligan.common.suggest import problems
from mulligan.env.envs.openenv import Settings as OpenEnvSettings
from mulligan.policy.backend import BackendSettings
from mulligan.policy.backends import BACKENDS
from mulligan.policy.config import PolicyModelSettings, PolicySettings
from mulligan.policy.model_request import ModelRequest

FAR = "http://192.0.2.7:30000"
# Each backend with a key, and each of its settings that names where the key goes.
SENDS: list[tuple[str, str, object]] = [
    ("sglang", "servers", [FAR]),
    ("sglang", "servers", ["http://127.0.0.1:1", FAR]),
    ("sglang", "router", FAR),
    ("vllm", "servers", [FAR]),
    ("openai", "base_url", f"{FAR}/v1"),
]


@pytest.mark.parametrize(
    ("url", "may"),
    [
        ("https://192.0.2.7", True),
        ("wss://example.org/ws", True),
        ("http://127.0.0.1:30000", True),
        ("http://127.8.8.8:30000", True),
        ("ws://[::1]:8000", True),
        ("http://localhost/v1", True),
        ("http://LOCALHOST/v1", True),
        ("http://192.0.2.7:30000", False),
        ("ws://example.org", False),
        ("http://localhost.example.org", False),
        ("http://127.0.0.1@example.org", False),
        ("http://[2001:db8::1]", False),
        ("http://", False),
        ("example.org:30000", False),
        ("127.0.0.1:30000", False),
        ("http://[::1", False),
    ],
)
def test_a_key_goes_over_tls_or_stays_on_this_machine(url: str, may: bool) -> None:
    assert (key_problem(url) == "") is may
    assert key_problem("http://192.0.2.7", insecure=True) == ""
    assert "secret" not in key_problem("http://me:secret@192.0.2.7/?key=secret")


def test_all_backends_with_keys_are_among_these() -> None:
    known = {(backend, setting) for backend, setting, _ in SENDS}
    found = {(name, setting) for name in BACKENDS.names for setting in BACKENDS.find(name).Settings.credentials}
    assert known == found


@pytest.mark.parametrize(("backend", "setting", "value"), SENDS)
def test_a_policy_whose_key_could_be_read_is_refused(backend: str, setting: str, value: object, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("a-secret\n")
    given_as = [{"api_key": "a-secret"}, {"api_key_file": str(file)}]
    for key in given_as:
        own: dict[str, Any] = {setting: value} | key
        given = {"backend": backend, "model": "m", backend: own}
        for kind, around, place in (
            (PolicySettings, given, ""),
            (PolicySettings, {"policies": {"other": given}}, "policies.other."),
            (PolicyModelSettings, given, ""),
        ):
            with pytest.raises(ValidationError) as caught:
                kind.model_validate(around)
            ((name, problem),) = problems(caught.value, kind).items()
            assert name == f"{place}{backend}.{setting}"
            assert "192.0.2.7" in problem and "expected https or wss, or `insecure` beside it" in problem
            assert f"{backend}.{setting}: the key for" in str(caught.value) and "a-secret" not in problem
        allowed = PolicyModelSettings.model_validate(given | {backend: own | {"insecure": True}})
        assert allowed.own.unprotected() is None
        secure = json.loads(json.dumps(own).replace("http://192", "https://192"))
        assert PolicyModelSettings.model_validate(given | {backend: secure}).own.unprotected() is None


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(("backend", "setting", "value"), SENDS)
def test_no_address_holds_credentials(backend: str, setting: str, value: object, scheme: str) -> None:
    """They would be sent as they are, and shown with the address."""
    bad = json.loads(json.dumps(value).replace("http://192", f"{scheme}://me:a-secret@192"))
    given = {"backend": backend, "model": "m", backend: {setting: bad}}
    for kind in (PolicySettings, PolicyModelSettings):
        with pytest.raises(ValidationError) as caught:
            kind.model_validate(given)
        ((name, problem),) = problems(caught.value, kind).items()
        assert name == f"{backend}.{setting}" and "a-secret" not in problem
        assert "192.0.2.7:30000: expected an address without a user or a password; " in problem
        assert "api_key_file is for the key" in problem
    options = {f"{backend}.{setting}": json.dumps(bad)}
    with pytest.raises(DomainError, match="expected an address without a user") as refused:
        ModelRequest(backend=backend, model="m", options=options).settings(None)
    assert refused.value.metadata == {"field": f"{backend}.{setting}"} and "a-secret" not in refused.value.message
    with pytest.raises(ValidationError, match=r"allowed_addresses\n.*192\.0\.2\.7: expected an address without"):
        PolicySettings.model_validate({"allowed_addresses": [f"{scheme}://me:a-secret@192.0.2.7"]})


@pytest.mark.parametrize(("backend", "setting", "value"), SENDS)
def test_load_model_sends_no_key_in_the_clear(backend: str, setting: str, value: object) -> None:
    options = {f"{backend}.{setting}": json.dumps(value), f"{backend}.api_key": '"mine"'}
    with pytest.raises(DomainError) as caught:
        ModelRequest(backend=backend, model="m", options=options).settings(None)
    assert caught.value.reason is Reason.INVALID_SETTING
    assert caught.value.metadata == {"field": f"{backend}.{setting}"}
    # `insecure` is of the server's settings alone, and of their own addresses.
    with pytest.raises(DomainError, match=rf"{backend}\.insecure: is set in the server's settings alone"):
        ModelRequest(backend=backend, model="m", options=options | {f"{backend}.insecure": "true"}).settings(None)
    given = {setting: value, "api_key": "theirs", "insecure": True}
    own = PolicyModelSettings.model_validate({"backend": backend, "model": "m", backend: given})
    assert ModelRequest(model="m").settings(own).own.unprotected() is None
    with pytest.raises(DomainError, match="would cross the network without TLS"):
        ModelRequest(model="m", options=options).settings(own)


def test_a_backend_of_others_without_the_setting_wants_tls() -> None:
    class Elsewhere(BackendSettings):
        credentials: ClassVar = {"where": frozenset({"key"})}
        where: str = ""
        key: SecretStr | None = None

    name, problem = Elsewhere(where=FAR, key=SecretStr("k")).unprotected() or ("", "")
    assert name == "where" and problem.endswith("expected https or wss")
    assert Elsewhere(where=FAR).unprotected() is None


@pytest.mark.parametrize("url", ["http://192.0.2.1:8000", "ws://192.0.2.1:8000"])
def test_the_token_of_an_openenv_server_goes_over_tls(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKE_TOKEN", "a-secret")
    with pytest.raises(ValueError, match=r"url: the key for .*192\.0\.2\.1:8000 would cross the network"):
        OpenEnvSettings(url=url, token_env="LAKE_TOKEN")
    for allowed in (
        OpenEnvSettings(url=url, token_env="LAKE_TOKEN", insecure=True),
        OpenEnvSettings(url=url),
        OpenEnvSettings(url=url.replace("192.0.2.1", "127.0.0.1"), token_env="LAKE_TOKEN"),
        OpenEnvSettings(url="https://192.0.2.1", token_env="LAKE_TOKEN"),
    ):
        assert allowed.server.endswith("/ws")
