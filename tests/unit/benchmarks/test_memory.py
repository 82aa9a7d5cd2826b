"""The benchmark of the memory at a small size."""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
import structlog

from benchmarks import memory


@pytest.mark.parametrize("runs", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_small_memory_is_measured_and_filled_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, runs: int
) -> None:
    configuration = structlog.get_config()
    arguments = ["memory", "--quick", "--sizes", "1000", "--folder", f"{tmp_path}"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(memory, "find_spec", lambda name: None)  # neither PostgreSQL nor wordllama
    filled = []
    for _ in range(runs):
        memory.main()
        *lines, last = capsys.readouterr().out.splitlines()
        result = json.loads(last)
        assert result["benchmark"] == "memory" and result["dense_recall"] == 1.0
        times = result["query_p99_ms_1k"]
        assert {f"{name}{way}" for name in (*memory.SINGLE, "mix") for way in ("", ", gRPC")} <= times.keys()
        assert all(value > 0 for value in times.values())
        assert any(line.startswith("| numpy's product alone |") for line in lines)
        assert result["writes_per_s"] > 0 < result["first_searches_s_1k"]
        with closing(sqlite3.connect(tmp_path / "1000.db")) as database:
            query = "SELECT entries FROM scopes WHERE name = 'asked'"
            filled.append(database.execute(query).fetchone()[0])
    structlog.configure(**configuration)
    assert filled == [1000] * runs, "the second run finds the database"
