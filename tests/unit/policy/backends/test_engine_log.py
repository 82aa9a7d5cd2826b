"""The log of a launched engine: bounded, private, and never in the engine's way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mulligan.policy.backends._servers import engine_log
from mulligan.policy.backends._servers.engine_log import EngineLog

_LIMIT = 100_000


def _write(log: EngineLog, program: str) -> None:
    output = log.start()
    try:
        subprocess.run([sys.executable, "-c", program], stdout=output, stderr=output, check=True, timeout=60)
    finally:
        os.close(output)
    log.finish(30.0)


def test_an_engine_that_writes_without_end_fills_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_log, "LOG_BYTES", _LIMIT)
    log = EngineLog(tmp_path / "new" / "engine.log")
    _write(log, "for number in range(199_999, 0, -1): print('request', number)")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "new").iterdir()}
    assert sizes.keys() == {"engine.log", "engine.log.1"}
    assert max(sizes.values()) <= _LIMIT < sum(sizes.values())
    assert log.end(100).endswith(b"request 1\n")
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "new").iterdir())


def test_what_an_engine_wrote_before_it_died_is_still_there_when_the_next_one_runs(tmp_path: Path) -> None:
    log = EngineLog(tmp_path / "engine.log")
    _write(log, "print('first')")
    _write(log, "print('second')")
    assert (tmp_path / "engine.log").read_text() == "second\n"
    assert (tmp_path / "engine.log.1").read_text() == "first\n"


def test_an_engine_goes_on_where_its_log_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipe is read all the same, or else it would wait for ever."""
    log = EngineLog(tmp_path / "engine.log")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    _write(log, "print('x' * 1_000_000)")
    assert log.end(10) == b""
