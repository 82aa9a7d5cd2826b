"""Processes that the sglang backend starts: how their failures are told, and that none outlives the service. A shell
script stands where the interpreter of SGLang's environment would be: these tests are about processes, not SGLang."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from mulligan import models
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy.backends.sglang import Settings as SglangSettings
from mulligan.policy.backends.sglang import open as open_backend
from tests.support.paths import IMPORT_ROOTS
from tests.support.processes import runs
from tests.support.settings import model_settings
from tests.support.waiting import wait_until

_SERVICE = """
import asyncio, sys
from pathlib import Path
from mulligan.policy.backends._servers.connection import new_session
from mulligan.policy.backends._servers.launch import LaunchedServer
from mulligan.policy.backends.sglang.connection import SglangConnection
from mulligan.policy.backends.sglang.server import SglangServer
from mulligan.policy.backends.sglang import Settings as SglangSettings

async def main():
    settings = SglangSettings(python=sys.argv[1])
    session = new_session()
    connect = lambda address: SglangConnection(session, address)
    server = SglangServer(connect("http://127.0.0.1:9"), 1.0, {})
    await LaunchedServer(server, connect, settings, "model", "0-original", Path(sys.argv[2]) / "log").start()

asyncio.run(main())
"""


def _script(folder: Path, text: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


async def _refused(folder: Path, **settings: object) -> tuple[str, str]:
    """What a caller of LoadModel is told, and what the service's log gets."""
    chosen = model_settings(backend="sglang", model=str(models.EMBEDDED), sglang=SglangSettings(**settings))
    with capture_logs() as lines, pytest.raises(UnsupportedModel) as caught:
        await open_backend(chosen, folder / "engine", 0)
    [failed] = [line for line in lines if line["event"] == "another server failed"]
    message = str(caught.value)
    assert failed["incident"] in message and failed["server"] == f"SGLang, {folder / 'engine' / 'sglang-0.log'}"
    return message, failed["said"]


async def test_the_services_log_says_why_a_server_did_not_start_and_callers_get_the_incident(tmp_path: Path) -> None:
    python = _script(tmp_path, 'echo "out of memory, DATABASE_PASSWORD=hunter2, says $*"; exit 3')
    message, said = await _refused(tmp_path, python=python, flags=("--tp", "2"))
    assert re.fullmatch("SGLang ended with status 3: incident [0-9a-f]{8}, this server's log has what it said", message)
    assert "out of memory, DATABASE_PASSWORD=hunter2" in said
    assert f"-m sglang.launch_server --model-path {models.EMBEDDED}" in said
    assert "--load-format safetensors" in said
    assert "--weight-version 0-original" in said and said.rstrip().endswith("--tp 2")


async def test_a_launched_server_gets_a_key_that_no_list_and_no_message_shows(tmp_path: Path) -> None:
    """In a file of its user alone. What the server says of it is not passed on."""
    python = _script(tmp_path, f'echo "$*" > {tmp_path}/list; shift 4; cp -p "$2" {tmp_path}/keys; cat "$2"; exit 3')
    for given in ({}, {"api_key": "of-requests", "admin_api_key": "of-changes"}):
        message, said = await _refused(tmp_path, python=python, **given)
        kept = json.loads((tmp_path / "keys").read_text())
        assert len(kept["api-key"]) > 10 and "(the key)" in said
        for key in kept.values():
            assert key not in message + said and key not in (tmp_path / "list").read_text()
        assert (tmp_path / "keys").stat().st_mode & 0o077 == 0
    assert kept == {"api-key": "of-requests", "admin-api-key": "of-changes"}


@pytest.mark.parametrize("flag", ["--api-key", "--admin-api-key=secret", "--config"])
def test_flags_hold_no_key(flag: str) -> None:
    with pytest.raises(ValidationError, match=f"flags\n.*{flag.partition('=')[0]}"):
        SglangSettings(flags=(flag, "x"))


def test_a_key_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("the-key\n")
    settings = SglangSettings(api_key_file=path, admin_api_key_file=path)
    assert settings.key is not None and settings.admin_key is not None
    assert {settings.key.get_secret_value(), settings.admin_key.get_secret_value()} == {"the-key"}
    path.write_text("the-key\nanother")
    for name in ("api_key_file", "admin_api_key_file"):
        with pytest.raises(ValidationError, match="expected one line with a key") as caught:
            SglangSettings(**{name: path})
        assert "another" not in str(caught.value)
        with pytest.raises(ValidationError, match="cannot be read: FileNotFoundError"):
            SglangSettings(**{name: tmp_path / "missing"})


async def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    python = _script(tmp_path, f"echo $$ > {tmp_path}/pid; echo loading; exec sleep 600")
    message, said = await _refused(tmp_path, python=python, start_seconds=3.0)
    assert "not ready within 3 s" in message and "loading" in said and "loading" not in message
    assert not runs(int((tmp_path / "pid").read_text()))


async def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    _, said = await _refused(tmp_path, python="/no/such/python")
    assert "/no/such/python" in said


def test_a_server_ends_with_the_service_that_started_it(tmp_path: Path) -> None:
    """However that ends."""
    python = _script(tmp_path, f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 600")
    environment = {**os.environ, "PYTHONPATH": IMPORT_ROOTS}
    command = [sys.executable, "-c", _SERVICE, python, str(tmp_path)]
    service = subprocess.Popen(command, env=environment)
    try:
        wait_until(lambda: (tmp_path / "pid").exists() or service.poll() is not None)
        assert service.poll() is None
    finally:
        service.send_signal(signal.SIGKILL)
        service.wait()
    server = int((tmp_path / "pid").read_text())
    wait_until(lambda: not runs(server))
