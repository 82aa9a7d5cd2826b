"""Flags of launched engines hold no secret, since other users see flags."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mulligan.policy.backends._servers import ServerSettings
from mulligan.policy.backends.sglang import Settings as SglangSettings
from mulligan.policy.backends.vllm import Settings as VllmSettings

BOTH = (SglangSettings, VllmSettings)


@pytest.mark.parametrize(
    ("kinds", "flags", "said"),
    [
        ([SglangSettings], ["--api-key", "SECRET"], "--api-key: other users see flags: set sglang.api_key_file"),
        ([SglangSettings], ["--admin-api-key=SECRET"], "set sglang.admin_api_key_file instead"),
        ([SglangSettings], ["--adm", "SECRET"], "--adm (or --admin-api-key): other users see flags"),
        (
            [VllmSettings],
            ["--api-key", "SECRET"],
            "set the variable VLLM_API_KEY of this service, and vllm.api_key",
        ),
        ([VllmSettings], ["--api_key=SECRET"], "--api_key: other users see flags"),
        ([VllmSettings], ["--tp", "2", "--api-k", "SECRET"], "--api-k (or --api-key): other users see flags"),
        (BOTH, ["--hf-token", "SECRET"], "set the variable HF_TOKEN_PATH of this service to a file with it instead"),
        (BOTH, ["--hf-t=SECRET"], "--hf-t (or --hf-token): other users see flags"),
        (BOTH, ["--ssl-keyfile", "key", "--ssl-keyfile-password", "SECRET"], "a key without a password instead"),
        (BOTH, ["--ssl-keyfile-p=SECRET"], "(or --ssl-keyfile-password)"),
        (BOTH, ["--some-store.access-key", "SECRET"], "--some-store.access-key: other users see flags: set a variable"),
        (BOTH, ["--proxy-auth-token=SECRET"], "--proxy-auth-token: other users see flags"),
        (BOTH, ["--store", "redis://me:SECRET@host"], "--store: other users see flags, and its value has a password"),
        (BOTH, ["--store=redis://me:SECRET@host"], "--store: other users see flags, and its value has a password"),
        (
            BOTH,
            ["--seen", "by", "http://me:SECRET@host"],
            "--seen: other users see flags, and its value has a password",
        ),
        (
            BOTH,
            ["--loader", '{"a": [{"password": "SECRET"}]}'],
            "--loader: other users see flags, and its value has pass",
        ),
        ([SglangSettings], ['--watermark-config={"key": "SECRET"}'], "--watermark-config: other users see flags"),
    ],
)
def test_a_flag_with_a_secret_is_refused(kinds: list[type[ServerSettings]], flags: list[str], said: str) -> None:
    for kind in kinds:
        with pytest.raises(ValidationError) as caught:
            kind(flags=flags)
        (error,) = caught.value.errors()
        assert error["loc"] == ("flags",) and said in error["msg"] and "SECRET" not in error["msg"]


def test_other_flags_are_passed_on() -> None:
    """Also where a name has `token` or `key` in it, and `--hf-token` without one: then the one of this user's file."""
    flags = [
        *("--ssl-keyfile", "/run/key.pem", "--max-total-tokens", "9", "--kt-max-deferred-experts-per-token", "2"),
        *("--tokenizer-path", "there", "--hf-token", "--hf-overrides", '{"pad_token": "x"}', "--no-such-key", "-1"),
        *("--watermark-config", "file.json", "--broken", "{", "--store", "redis://host:1", "--hf-token"),
    ]
    for kind in BOTH:
        assert kind(flags=flags).flags == tuple(flags)


def test_a_secret_that_json_leaves_out_is_none() -> None:
    assert VllmSettings(flags=["--loader", '{"password": null}']).flags
