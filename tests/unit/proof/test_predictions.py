"""What is measured of single methods, and how it is told."""

from __future__ import annotations

import tomllib

import pytest

from mulligan.common.experience import Experience, Sample, Segment, SegmentKind, TokenSequence, Turn
from mulligan.common.types import Outcome
from mulligan.trainer.settings import EvaluationSettings
from proof.predictions import CASES, as_toml, cost, page, protocols


def sample(role: str, turns: int, tokens: int, *, text: str = "") -> Sample:
    return Sample(
        sample_id=role,
        role=role,
        outcome=Outcome.COMPLETED,
        sequences=(TokenSequence((Segment(SegmentKind.SAMPLED, tuple(range(tokens))),)),),
        temperature=1.0,
        reward=0.0,
        turns=tuple(Turn("board", "Up", "", 0.0) for _ in range(turns)),
        text=text,
        episode_id="" if text else role,
    )


@pytest.mark.parametrize("method", sorted({case.split("/")[1].rpartition("-")[0] for case in CASES}))
def test_the_protocols_of_a_method_are_settings_of_an_evaluation(method: str) -> None:
    wanted = protocols(method)
    assert tomllib.loads(f"protocols = {as_toml(wanted)}")["protocols"] == wanted
    settings = EvaluationSettings.model_validate({"protocols": wanted})
    assert [one.name for one in settings.protocols] == [one["name"] for one in wanted]


def test_what_a_pair_costs() -> None:
    tried = (sample("first", 8, 16), sample("reflection", 1, 10, text="a legend"), sample("second", 4, 8))
    experience = Experience("a", "run", 0, "lake", "task", 0, tried)
    found = cost([experience, experience], 2)
    assert (found["environment_steps"], found["texts"]) == (24, 2)
    assert (found["environment_steps_per_pair"], found["sampled_tokens_per_pair"]) == (12, 34)
    assert cost([experience], 0)["environment_steps_per_pair"] is None


def test_the_page_has_means_and_what_is_missing() -> None:
    def one(value: float) -> dict[str, object]:
        before = {"step": 0, "success": 0.3, "pass_at_k/pass@3": 0.6}
        after = {"step": 100, "success": value, "pass_at_k/pass@3": value}
        return {"method": "rlvr", "evaluations": [before, after]}

    told = page({"rlvr": [one(0.7), one(0.9)]})
    assert "| `rlvr` | 2 | - | 0.80 (0.70 – 0.90) | - | - | - |" in told
    assert "| before training | 2 | - | 0.60 (0.60 – 0.60) |" in told
    assert "| `spar` | 0 | first 20 | - | - | - |" in told
