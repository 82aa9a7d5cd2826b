from __future__ import annotations

import json
from pathlib import Path

from mulligan.common.experience import Sample, Turn
from mulligan.common.types import Outcome
from mulligan.env.envs import DEFAULT_ENVIRONMENTS
from mulligan.env.load import load_or_explain
from proof.embedded import hotpotqa_context, valid_share
from tests.support.paths import ROOT


def played(environment: str, task: str, *answers: str) -> Sample:
    """An episode of the environment itself."""
    episode = load_or_explain(environment, DEFAULT_ENVIRONMENTS[environment]).start(task)
    turns = []
    for answer in answers:
        result = episode.step(answer)
        turns.append(Turn(episode.observation, answer, result.action, result.reward))
    return Sample("one", "first", Outcome.COMPLETED, (), 1.0, turns=tuple(turns))


def test_valid_actions_are_those_that_the_environment_read() -> None:
    moves = played("sokoban-small", "test/00000", "```Up```", "Up", "```Fly```", "```Left```")
    assert valid_share([moves]) == 0.5
    assert valid_share([moves, played("sokoban-small", "test/00000", "?")]) == 0.4
    assert valid_share([]) == 0.0


def test_the_committed_figures_of_the_context_are_those_of_today() -> None:
    committed = json.loads((ROOT / "docs" / "proof" / "embedded" / "hotpotqa-context.json").read_text())
    measured = hotpotqa_context(Path())
    assert measured == {name: committed[name] for name in measured}
