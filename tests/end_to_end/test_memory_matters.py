"""A short case of `proof/memory.py`, over processes: a poisoned memory, and a run that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from proof.memory import ARMS, measure


@pytest.mark.timeout(240)
def test_a_poisoned_memory_is_read_and_its_uses_are_counted(tmp_path: Path) -> None:
    found = measure(ARMS["poisoned"], 0, 2, tmp_path / "case")
    (window,) = found["windows"]
    assert window["first_attempts"] == 16 and 0 < window["second_attempts"] < 16
    assert window["poison_shown"] > 0.4, "the memory has little else"
    assert len(found["poison"]) == 10 and all(one["right"] == 0 for one in found["poison"])
    assert sum(sum(one["evidence"]["uses"]) for one in found["poison"] if one["evidence"]) > 0
