"""The benchmark of the memory at a small size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import structlog

from benchmarks import memory


def test_a_small_memory_is_measured_and_filled_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    configuration = structlog.get_config()
    arguments = ["memory", "--quick", "--sizes", "1000", "--folder", f"{tmp_path}"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(memory, "find_spec", lambda name: None)  # neither PostgreSQL nor wordllama
    filled = []
    for _ in range(2):
        memory.main()
        *lines, last = capsys.readouterr().out.splitlines()
        result = json.loads(last)
        assert result["benchmark"] == "memory" and result["dense_recall"] == 1.0
        times = result["query_p99_ms_1k"]
        assert {f"{name}{way}" for name in (*memory.SINGLE, "mix") for way in ("", ", gRPC")} <= times.keys()
        assert all(value > 0 for value in times.values())
        assert any(line.startswith("| numpy's product alone |") for line in lines)
        filled.append(result["writes_per_s"])
    structlog.configure(**configuration)
    assert filled[0] > 0 and filled[1] is None, "the second run finds the database"
