"""The endpoints of commands: credentials that cannot be sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mulligan.cli.connection import UnusableEndpoint, find_endpoint
from mulligan.cli.run_credentials import _file, kept_credential


@pytest.mark.parametrize("variable", ["MULLIGAN_CLI_TOKEN", "MULLIGAN_CLI_RUN_CREDENTIAL"])
@pytest.mark.parametrize("value", ["two words", "t\n", "ü", "x" * 4097])
def test_what_metadata_cannot_carry_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UnusableEndpoint, match=f"{variable}: expected at most 4,096 printable") as raised:
        find_endpoint("127.0.0.1:1")
    assert value not in str(raised.value)


def test_a_kept_file_with_no_credential_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("MULLIGAN_CLI_RUN_CREDENTIAL", raising=False)
    file = _file("127.0.0.1:1", "run")
    file.parent.mkdir(parents=True, mode=0o700)
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
    for content in (b"", b"\xff\xfe", b"one two"):
        file.write_bytes(content)
        with pytest.raises(OSError, match="holds no credential of a run"):
            kept_credential("127.0.0.1:1", "run")
