"""A short case of `proof/memory.py`, over processes: a poisoned memory, and a run that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from proof.memory import ARMS, measure


@pytest.mark.timeout(240)
def test_a_poisoned_memory_is_read_and_its_uses_are_counted(tmp_path: Path) -> None:
    found = measure(ARMS["evidence-poisoned"], 0, 2, tmp_path / "case")
    before, after = found["windows"]
    assert before["first_attempts"] == after["first_attempts"] == 16
    assert before["poison_shown"] in (0, None) and after["poison_shown"] > 0, "it is the latest"
    assert len(found["poison"]) == 10 and all(one["right"] == 0 for one in found["poison"])
    assert sum(sum(one["evidence"]["uses"]) for one in found["poison"] if one["evidence"]) > 0
