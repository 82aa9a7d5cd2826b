"""Tree search for preference pairs (SPaR, arXiv 2412.11605) on numbers computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.experience import Experience
from mulligan.common.types import Outcome
from mulligan.trainer.algorithms.spar import NEEDS, Settings, score_in
from mulligan.trainer.objectives.preference import Preference
from mulligan.trainer.trainable import drop_notices
from tests.support.fakes import FakeEnvironment, FakePolicy, timeout
from tests.support.loop import Loop, lives, refused, trained_text, whole_text


def loop(said: Sequence[str], *, environment: FakeEnvironment | None = None, **more: Any) -> Loop:
    """An episode has three turns, and pays 1/3 for each `go`."""
    answers = iter(said)
    verdicts = iter(more.pop("verdicts", ()))

    def say(system: str, last: str) -> str:
        return next(verdicts) if "How good" in last else next(answers)

    policies = more.pop("policies", {})
    rollout = {"rollouts_per_task": 1, "max_restarts": 0} | more.pop("rollout", {})
    table = {"name": "spar", "depth": 1, "branches": 2, "fork_turn": "last"} | more
    environment = environment or FakeEnvironment({"t0": "go"}, turns=3, in_parts=True)
    return Loop(say, environment=environment, algorithm=table, rollout=rollout, policies=policies)


def pairs(made: Loop) -> list[tuple[str, str]]:
    """What is trained of the chosen and of the rejected one."""
    found = []
    for datum in made.branch("pairs"):
        assert isinstance(datum.objective, Preference)
        rejected = zip(datum.objective.rejected.token_ids, datum.objective.rejected.loss_mask, strict=True)
        found.append((trained_text(datum), "".join(chr(token) for token, loss in rejected if loss)))
    return found


def tree(experience: Experience) -> list[tuple[str, int, str]]:
    """Parent, turn of the fork and answers of each episode."""
    names = {sample.sample_id: sample.sample_id.removeprefix(experience.experience_id) for sample in experience.samples}
    return [
        (names.get(sample.parent_id, ""), sample.forked_from.step_index, "".join(turn.text for turn in sample.turns))
        for sample in experience.samples
        if sample.forked_from
    ]


async def test_the_best_branch_is_preferred_to_the_worst() -> None:
    made = loop(["a", "b", "c", "x", "go"], pair_weight=0.5)
    (one,) = await made.step()
    assert [sample.role for sample in one.samples] == ["first", "branch", "branch"]
    assert tree(one) == [("-first", 2, "x"), ("-first", 2, "go")]
    assert pairs(made) == [("go]", "x]")]
    (datum,) = made.branch("pairs")
    before = "[system:solve][user:board t0][assistant:a][user:after a][assistant:b][user:after b][assistant:"
    assert whole_text(datum) == f"{before}go]" and datum.weight == 0.5
    assert isinstance(datum.objective, Preference)
    assert "".join(map(chr, datum.objective.rejected.token_ids)) == f"{before}x]"
    assert (datum.objective.beta, datum.objective.ftx, datum.temperature) == (0.1, 0.1, 0.7)


async def test_the_episodes_own_rest_can_be_the_worst() -> None:
    made = loop(["a", "b", "c", "go", "go"])
    await made.step()
    assert pairs(made) == [("go]", "c]")], "the first two turns are those of both, and carry no loss"


@pytest.mark.parametrize("said", [["a", "b", "c", "x", "y"], ["a", "b", "go", "x", "y"]])
async def test_where_no_branch_is_better_there_is_no_pair(said: list[str]) -> None:
    made = loop(said)
    await made.step()
    assert made.learner.steps == []


async def test_a_solved_task_has_no_tree() -> None:
    made = loop(["go", "go", "go"])
    (one,) = await made.step()
    assert len(one.samples) == 1 and made.learner.steps == []


async def test_the_best_branches_grow_further_until_one_solves_the_task() -> None:
    """The first two turns are right, so that a branch whose own is right solves the task."""
    made = loop(["go", "go", "c", "y", "z", "x", "go"], depth=9, keep=1)
    (one,) = await made.step()
    assert tree(one) == [
        ("-first", 2, "y"),
        ("-first", 2, "z"),
        ("-branch", 2, "x"),
        ("-branch", 2, "go"),
    ]
    assert pairs(made) == [("go]", "x]")], "of equally bad ones a branch comes before the rest of its source"
    assert one.samples[-1].parent_id == one.samples[1].sample_id


async def test_of_a_level_the_best_are_kept() -> None:
    """Forks at the last turn; level 1 has rewards 0, 1/3, 0 beyond the turns before, of which `keep` go on."""
    made = loop(["a", "b", "c", "x", "go", "y", *"uvw", *"klm"], depth=2, branches=3, keep=2)
    (one,) = await made.step()
    assert [parent for parent, _, _ in tree(one)] == ["-first"] * 3 + ["-branch-2"] * 3 + ["-branch"] * 3


async def test_any_turn_can_be_that_of_the_fork() -> None:
    turns = set()
    for seed in range(20):
        made = loop(["a"] * 30, fork_turn="any", depth=2)
        made.settings = made.settings.model_copy(update={"seed": seed})
        (one,) = await made.step()
        first, *later = [turn for _, turn, _ in tree(one)]
        turns.add(first)
        assert later[0] == first and all(turn >= first for turn in later), "a branch is forked at a turn of its own"
    assert turns == {0, 1, 2}


async def test_a_judge_can_select() -> None:
    """Verdicts on the first episode and on three branches, the last one without a number."""
    made = loop(
        ["a", "b", "c", "x", "y", "z"],
        branches=3,
        score="judge",
        verdicts=["5", "I say 2 of 10: 2", "7.5", "no idea"],
    )
    (one,) = await made.step()
    verdicts = [sample for sample in one.samples if sample.role == "verdict"]
    assert [verdict.reward for verdict in verdicts] == [5.0, 2.0, 7.5, None]
    assert pairs(made) == [("y]", "x]")]
    trunk = made.policy.calls[-1][0][0].content
    assert trunk.startswith("board t0>A;after a>B;after b>Z;after z\nwrong\n\nHow good"), "the whole path"


async def test_a_verdict_that_was_cut_gives_no_score() -> None:
    """The number is to stand at its end."""
    made = loop(
        ["a", "b", "c", "x", "y"],
        score="judge",
        verdicts=["5", "it has 9 moves, and none of them is good: 1", "7"],
        rollout={"reflection_max_tokens": 20},
    )
    (one,) = await made.step()
    verdicts = [sample for sample in one.samples if sample.role == "verdict"]
    assert [verdict.reward for verdict in verdicts] == [5.0, None, 7.0]
    assert verdicts[1].outcome is Outcome.TRUNCATED
    assert pairs(made) == [("y]", "c]")], "the branch without a score is left out"
    assert made.metrics["dropped"] == made.metrics["dropped_cut_verdict"] == 1.0
    (notice,) = drop_notices(made.metrics)
    assert "verdict" in notice and "rollout.reflection_max_tokens" in notice


async def test_the_judge_can_be_another_policy() -> None:
    made = loop(["a", "b", "c", "x", "y"], score="judge", policies={"judge": "wise"})
    said = iter(["1", "2", "3"])
    made.policy.others["wise"] = FakePolicy(lambda system, last, _: next(said))
    (one,) = await made.step()
    assert {sample.policy for sample in one.samples if sample.role == "verdict"} == {"wise"}
    assert pairs(made) == [("y]", "c]")]


async def test_a_branch_lost_to_the_infrastructure_is_left_out() -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=3)

    def fail(episode_id: str) -> None:
        if "-branch-x-" in episode_id and "trunk" not in episode_id:
            raise timeout()

    environment.fail = fail
    made = loop(["a", "b", "c", "x", "go"], environment=environment)
    (one,) = await made.step()
    assert [sample.reward for sample in one.samples] == [0.0, None, 1.0]
    assert pairs(made) == [("go]", "c]")]


@pytest.mark.parametrize(
    ("answer", "score"), [("7", 7.0), ("1 of 10, no, 3.5.", 3.5), ("-2", -2.0), ("", None), ("good", None)]
)
def test_the_score_is_the_last_number(answer: str, score: float | None) -> None:
    assert score_in(answer) == score


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(
        lambda: loop(["a", "b", "c", *"uvwxyz" * 4], depth=2, fork_turn="any", score="judge", verdicts="1" * 9),
        tmp_path,
    )
    assert first == second and len(first[0].samples) == 14


def test_settings() -> None:
    settings = Settings()
    assert (settings.depth, settings.branches, settings.keep) == (3, 3, 2) and {"fork", "tokenize"} == NEEDS
    assert loop([], score="judge").survive_the_wire()
    assert refused({"name": "spar", "depth": 0})[0] == "algorithm.depth"
    assert "'any' or 'last'" in refused({"name": "spar", "fork_turn": "first"})[1]
