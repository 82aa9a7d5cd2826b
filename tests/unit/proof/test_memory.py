"""What is read off a run about its memory, and the legends that poison one."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from mulligan.common.experience import Experience, Sample, Turn
from mulligan.common.reflections import Provenance, StoredReflection
from mulligan.common.types import Outcome
from mulligan.models.many_symbols.measure import legend
from proof.memory import MEANINGS, page, right_share, told, window, wrong_legends


def test_wrong_legends_are_wrong_in_every_line_and_differ() -> None:
    for seed in range(5):
        wrong = wrong_legends(seed)
        assert len(set(wrong)) == 10
        for text in wrong:
            assert right_share(text) == 0
            assert sorted(line[0] for line in text.splitlines()) == sorted(MEANINGS)
            assert sorted(line[2:] for line in text.splitlines()) == sorted(MEANINGS.values())
    assert wrong_legends(1) == wrong_legends(1) != wrong_legends(2)


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0), ("A player", 0.125), ("A player\nB hole\nC hole", 0.25), ("A player\nA player", 0.125), ("A  player", 0)],
)
def test_a_legend_is_right_by_its_lines(text: str, share: float) -> None:
    assert right_share(text) == share
    assert right_share(legend()) == 1


def sample(role: str, reward: float | None, text: str = "") -> Sample:
    turns = (Turn("board", text, "", 0.0),)
    return Sample(role, role, Outcome.COMPLETED, (), temperature=1.0, reward=reward, turns=turns, text=text)


def chain(name: str, *shown: str, legend: str = "", second: float | None = None) -> Experience:
    samples = [sample("first", 0.0 if legend else 1.0)]
    if legend:
        samples += [sample("reflection", second, legend), sample("second", second)]
    return Experience(name, "run", 0, "lake", "task", 0, tuple(samples), memory_entry_ids=shown)


def entry(name: str, text: str) -> StoredReflection:
    origin = Provenance("run", name, "lake", "task", 0, 0.0, 1.0, success=True)
    return StoredReflection(name, "run", text, origin, 1, datetime.now(UTC))


def test_a_window_tells_what_was_shown_and_what_came_of_it() -> None:
    entries = {"good": entry("good", "A player\nB goal"), "bad": entry("bad", "A goal")}
    chains = [
        chain("solved at once"),
        chain("told well", "good", "bad", legend="A player\nB goal", second=1.0),
        chain("told badly", "bad", legend="A goal", second=0.0),
        chain("told nothing", legend="A player", second=0.0),
    ]
    assert window(chains, entries, {"bad"}) == {
        "first_attempts": 4,
        "first_success": 0.25,
        "second_attempts": 3,
        "second_success": 0.3333,
        "right_in_reflections": 0.125,
        "right_in_first_entry": 0.125,
        "poison_shown": 0.6667,
        "poison_shown_first": 0.5,
    }
    lost = chain("lost", legend="A goal", second=None)
    assert window([lost], entries, set())["second_success"] is None


def test_the_page_tells_means_and_ranges_and_what_became_of_the_poison() -> None:
    def run(first: float, last: float, statuses: list[str]) -> dict[str, object]:
        windows = [
            {"second_success": one, "poison_shown": 0.0, "right_in_reflections": 1.0} for one in (0, first, 0.5, last)
        ]
        return {"windows": windows, "poison": [{"status": status} for status in statuses]}

    evidence = [run(0.25, 0.5, ["quarantined"]), run(0.25, 1.0, ["active"])]
    text = page({"latest": [run(0.5, 0.75, [])], "evidence-poisoned": evidence})
    assert "| no | 1 | 0.50 (0.50 – 0.50) | 0.50 (0.50 – 0.50) | 0.75 (0.75 – 0.75) | - |" in text
    assert "| yes | 2 | 0.25 (0.25 – 0.25) | 0.50 (0.50 – 0.50) | 0.75 (0.50 – 1.00) | 0.00 (0.00 – 0.00) |" in text
    assert "- evidence: 1 quarantined, 1 active" in text
    assert told([None]) == "-"
