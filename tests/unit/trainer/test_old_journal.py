"""A journal that was written before samples had roles reads as it read then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mulligan.common.experience import Experience
from mulligan.common.experience_wire import experience_from_proto, experience_to_proto
from mulligan.trainer.journal import read_experiences

RECORDED = Path(__file__).parent / "recorded"
EXPERIENCES = read_experiences(RECORDED / "journal-v1.msgpack")
BEFORE: list[dict[str, Any]] = json.loads((RECORDED / "experiences-v1.json").read_text())


def plain(part: Any) -> dict[str, Any]:
    """As it was printed then: what a turn sent was not known."""
    found: dict[str, Any] = json.loads(msgspec.json.encode(part))
    assert [turn.pop("sent") for turn in found.get("turns", ())] == [None] * len(found.get("turns", ()))
    return found


@pytest.mark.parametrize("number", range(len(BEFORE)))
def test_every_part_is_what_it_was(number: int) -> None:
    now = EXPERIENCES[number]
    before = BEFORE[number]
    for name in ("experience_id", "run_id", "step", "environment", "task_id", "rollout"):
        assert plain(now)[name] == before[name]
    assert list(now.memory_entry_ids) == before["memory_entry_ids"] and now.untrained == ()
    for field, role in (("first_attempt", "first"), ("reflection", "reflection"), ("second_attempt", "second")):
        sample = now.sample(role)
        assert (sample is None) == (before[field] is None)
        if sample is not None:
            shared = plain(sample).keys() & before[field].keys()
            assert {"sequences", "reward", "outcome", "temperature"} <= shared
            assert {name: plain(sample)[name] for name in shared} == {name: before[field][name] for name in shared}
    target = now.target("distilled")
    assert (target is None) == (before["distilled"] is None)
    if target is not None:
        assert plain(target)["sequences"] == before["distilled"]["sequences"]
        assert target.source_id == before["distilled"]["source_attempt_id"]


@pytest.mark.parametrize("experience", EXPERIENCES)
def test_the_wire_has_the_tree_and_the_parts_that_older_clients_read(experience: Experience) -> None:
    message = experience_to_proto(experience)
    assert experience_from_proto(message) == experience
    del message.samples[:], message.targets[:]  # as an older server sends it
    message.algorithm = ""
    assert experience_from_proto(message) == experience
