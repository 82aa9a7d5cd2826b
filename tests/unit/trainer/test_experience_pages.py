"""Pages of a run's experiences."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mulligan.common.v1 import experience_pb2
from mulligan.trainer import servicer as module
from mulligan.trainer.v1 import run_service_pb2 as pb

STEPS = {0: ["a", "b", "c"], 1: [], 2: ["d", "e"], 4: ["f"]}


@pytest.fixture
def servicer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> module.RunServicer:
    for step in STEPS:
        (tmp_path / str(step)).touch()
    monkeypatch.setattr(module, "journaled_steps", lambda _: list(STEPS))
    monkeypatch.setattr(module, "journal_file", lambda folder, step: folder / str(step))
    monkeypatch.setattr(module, "read_experiences", lambda file: STEPS[int(file.name)])
    monkeypatch.setattr(module, "experience_to_proto", lambda one: experience_pb2.Experience(experience_id=one))
    run = SimpleNamespace(folder=SimpleNamespace(journal=tmp_path))
    manager: Any = SimpleNamespace(run=lambda _: run)
    return module.RunServicer(manager)


async def pages(servicer: module.RunServicer, size: int) -> list[str]:
    found: list[str] = []
    token = ""
    while True:
        request = pb.ListExperiencesRequest(run_id="run", page_size=size, page_token=token)
        answer = await servicer.ListExperiences(request, None)
        found.append("".join(one.experience_id for one in answer.experiences))
        if not (token := answer.next_page_token):
            return found


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, list("abcdef")), (2, ["ab", "cd", "ef"]), (3, ["abc", "def"]), (4, ["abcd", "ef"]), (100, ["abcdef"])],
)
async def test_all_experiences_once(servicer: module.RunServicer, size: int, expected: list[str]) -> None:
    assert await pages(servicer, size) == expected


@pytest.mark.parametrize(("most", "expected"), [(1, list("abcdef")), (6, ["ab", "cd", "ef"]), (100, ["abcdef"])])
async def test_a_page_ends_before_it_is_larger_than_a_message(
    servicer: module.RunServicer, monkeypatch: pytest.MonkeyPatch, most: int, expected: list[str]
) -> None:
    """Each of these has three bytes. One that is larger alone is a page of its own."""
    monkeypatch.setattr(module, "_PAGE_BYTES", most)
    assert await pages(servicer, 100) == expected
