"""Options hold no secrets: other users see them in the list of processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mulligan.cli.overrides import read_overrides
from mulligan.cli.policy import _read_secrets, _without_secrets


@pytest.mark.parametrize(
    ("override", "name"),
    [("openai.api_key=SECRET", "openai.api_key"), ('sglang={"admin_api_key" = "SECRET"}', "sglang.admin_api_key")],
)
def test_a_model_is_loaded_without_keys_among_the_options(
    override: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        _without_secrets(read_overrides([override]))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "SECRET" not in said
    assert f"--set {name}: is a secret, and other users see options: expected --secret {name}=FILE" in said
    assert _without_secrets({"openai.base_url": "https://h/v1"}) == {"openai.base_url": "https://h/v1"}


def test_a_key_comes_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("SECRET\n")
    assert _read_secrets([f"openai.api_key={tmp_path / 'key'}"]) == {"openai.api_key": "SECRET"}
    for given, problem in (("openai.api_key", "expected NAME=FILE"), (f"a={tmp_path}/no", "cannot be read")):
        with pytest.raises(SystemExit):
            _read_secrets([given])
        assert problem in capsys.readouterr().err


def test_no_option_has_a_password_in_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_overrides(["tracking.writers=[{uri = 'https://me:SECRET@host'}]"])
    said = capsys.readouterr().err
    assert "tracking.writers: has a password" in said and "SECRET" not in said
