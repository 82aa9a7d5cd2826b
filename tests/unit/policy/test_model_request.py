"""What is kept of a LoadModel request, and when it is still good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from mulligan.common.errors import DomainError
from mulligan.policy.backends.sglang import Settings as SglangSettings
from mulligan.policy.config import PolicySettings
from mulligan.policy.model_request import ModelRequest, settings_digest
from tests.support.settings import model_settings

SGLANG = {"backend": "sglang", "sglang": {"servers": ["http://h:1"], "api_key": "k", "insecure": True}}
# The policy's own settings, the digest that 0.1.0 made of them, and that of today.
DIGESTS = [
    (
        {},
        "c0380102aad19fbe04fa4b82507f8e2b9c6edd7a0e8ee9de0bf549cf63b71d9e",
        "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    ),
    (
        SGLANG,
        "7747f4eec4b538f1cfc927189c6fe4bc430c417eac44ee95f959004ec078547f",
        "3407832c8381788601ca89d69a264f406ea1e2a914ccd972f1d0a5f38407b8b0",
    ),
    (
        {"backend": "openai", "model": "x", "openai": {"base_url": "http://e"}},
        "4014994011e91438e6335a251b22b4072faa62b88bc70a6656d95bde010c703f",
        "0b1aef69ce82d0f0cd731a7654bec2021596b8bfb56e89fe3453b97942bbafd1",
    ),
]


@pytest.mark.parametrize(("own", "first", "present"), DIGESTS)
def test_a_request_that_an_older_service_kept_is_good(own: dict[str, Any], first: str, present: str) -> None:
    for settings in (model_settings(**own), PolicySettings(**own)):
        assert settings_digest(settings) == present
        for digest in (first, present):
            assert ModelRequest(model="m", own=digest).over(settings) == ModelRequest(model="m", own=present)
        changed = settings.model_copy(update={"context_length": 7})
        assert ModelRequest(model="m", own=first).over(changed) is None
        assert ModelRequest(model="m", own=present).over(changed) is None


def test_a_policy_of_its_own_settings_is_another_than_one_without() -> None:
    assert ModelRequest(model="m").over(None) == ModelRequest(model="m")
    assert ModelRequest(model="m").over(model_settings()) is None
    assert ModelRequest(model="m", own=settings_digest(model_settings())).over(None) is None


def test_another_credential_of_a_module_is_no_other_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guarded_backend.py").write_text(
        "from pydantic import SecretStr\n"
        "from mulligan.policy import BackendSettings\n"
        "class Settings(BackendSettings):\n"
        "    key: SecretStr\n"
        "    loudness: int = 1\n"
        "open = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def settings(**own: Any) -> Any:
        return model_settings(backend="guarded_backend", backend_settings=own)

    digest = settings_digest(settings(key="first"))
    assert settings_digest(settings(key="second")) == digest
    assert settings_digest(settings(key="first", loudness=2)) != digest
    assert "first" not in repr(settings(key="first"))


def test_keys_stay_with_the_servers_that_they_are_of(tmp_path: Path) -> None:
    """A caller that names other servers does not have them told the key, and names no file of this machine."""
    key = tmp_path / "key"
    key.write_text("the-key")
    own = model_settings(backend="sglang", sglang=SglangSettings(servers=("https://h:1",), api_key_file=key))
    same = ModelRequest(model="m", options={"sglang.request_seconds": "9"}).settings(own)
    assert same.own_as(SglangSettings).key == SecretStr("the-key")
    elsewhere = ModelRequest(model="m", options={"sglang.servers": '["http://other:1"]'}).settings(own)
    assert elsewhere.own_as(SglangSettings).key is None
    with pytest.raises(DomainError, match=r"sglang\.api_key_file: is set in the server's settings alone"):
        ModelRequest(model="m", options={"sglang.api_key_file": f'"{key}"'}).settings(own)


def test_a_revision_is_of_one_model() -> None:
    own = model_settings(model="owner/one", revision="v1")
    assert ModelRequest(model="owner/one").settings(own).revision == "v1"
    assert ModelRequest(model="owner/two").settings(own).revision == ""
    assert ModelRequest(model="owner/two", options={"revision": '"v2"'}).settings(own).revision == "v2"
    with pytest.raises(ValidationError, match="revision: openai has models by name alone"):
        model_settings(backend="openai", model="x", revision="v1", openai={"base_url": "http://e"})
