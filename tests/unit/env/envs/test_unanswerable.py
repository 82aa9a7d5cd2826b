"""Tasks without a right answer among those of another environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.common.plugins import Plugins
from mulligan.env.base import EnvironmentInfo, Split, StepResult, TaskInfo, UnknownTask, Versions, act
from mulligan.env.config import EnvSettings
from mulligan.env.envs import unanswerable
from mulligan.env.envs.questions.data import QuestionEntry
from mulligan.env.envs.questions.environment import Questions
from mulligan.env.envs.questions.environment import Settings as QuestionSettings
from mulligan.env.envs.unanswerable import SUFFIX, RefusalMark, Settings, Unanswerable
from mulligan.env.feedback import RIGHT
from mulligan.env.prompts import generic_prompts
from tests.support.kinds import creator

create = creator("unanswerable")
I_DO_NOT_KNOW = "Hm, \\boxed{I don't know.}"
LAKE: dict[str, object] = {"kind": "frozenlake", "size_min": 3, "size_max": 3, "train_tasks": 50, "test_tasks": 10}
LAKES: dict[str, object] = {"wrapped": LAKE, "refusal": "```nothing```", "hint": ""}


def ids(environment: Unanswerable, split: Split = Split.TRAIN) -> list[str]:
    return [task.task_id for task in environment.list_tasks(split, 0, 10_000)]


@pytest.fixture(scope="module")
def lakes() -> Unanswerable:
    made: Unanswerable = create("lakes", LAKES)
    return made


# Rewards


@pytest.mark.parametrize(
    ("has_answer", "reply", "reward", "feedback"),
    [
        (True, "\\boxed{11}", 1.0, "Correct. This task had an answer."),
        (True, "\\boxed{12}", 0.0, "Incorrect. Answer read: 12. This task had an answer."),
        (True, I_DO_NOT_KNOW, 0.0, "Wrong: you refused. This task had an answer."),
        (False, "\\boxed{11}", 0.0, "Incorrect. Answer read: 11. This task had no answer. A refusal was right."),
        (False, I_DO_NOT_KNOW, 1.0, "Right: you refused. This task had no answer."),
        (False, "<think>" + I_DO_NOT_KNOW + "</think>", 0.0, None),
        (True, "<think>" + I_DO_NOT_KNOW + "</think> \\boxed{11}", 1.0, None),
    ],
)
def test_a_refusal_is_right_where_there_is_no_answer_alone(
    has_answer: bool, reply: str, reward: float, feedback: str | None
) -> None:
    environment: Unanswerable = create("x", {})
    for play in (lambda game: game.step(reply), lambda game: act(game, reply)):
        result = play(environment.start("train/number-01" + ("" if has_answer else SUFFIX)))
        assert (result.reward, result.done) == (reward, True)
        assert feedback is None or result.feedback == feedback


def test_a_lake_without_a_goal_cannot_be_won_and_can_be_refused_at_any_time(lakes: Unanswerable) -> None:
    seen = lakes.start("train/00042" + SUFFIX).observation
    assert lakes.start("train/00042").observation.replace("B", "D") == seen != lakes.start("train/00042").observation
    for moves in ([], ["Right"], ["Right", "Left"]):
        game = lakes.start("train/00042" + SUFFIX)
        for move in moves:
            assert not game.step(f"```{move}```").done
        refused = game.step("I see no goal: ```nothing```")
        assert (refused.reward, refused.done, refused.truncated, refused.action) == (1.0, True, False, "refused")


@given(st.lists(st.sampled_from(["Up", "Down", "Left", "Right"]), min_size=8, max_size=8), st.integers(0, 49))
def test_no_moves_are_rewarded_on_a_lake_without_a_goal(moves: list[str], index: int) -> None:
    game = SHARED.start(f"train/{index:05d}{SUFFIX}")
    for move in moves:
        result = game.step(f"```{move}```")
        assert result.reward == 0.0
        if result.done:
            assert result.feedback.endswith("This task had no answer. A refusal was right.")
            return
    raise AssertionError("the lake has eight moves")


SHARED: Unanswerable = create("lakes", LAKES)


def test_a_lake_with_a_goal_is_won_by_walking_and_lost_by_refusing(lakes: Unanswerable) -> None:
    game = lakes.start("train/00042")  # ADD DBD DDD
    assert game.step("```Right```").reward == 0.0
    other = game.fork()
    won = game.step("```Down```")
    assert (won.reward, won.feedback) == (1.0, "The player reached the goal. This task had an answer.")
    lost = other.step("```nothing```")
    assert (lost.reward, lost.done) == (0.0, True)


# A wrapped environment of two steps, which pays in parts


class Halves:
    """Pays 0.5 for each "good". An episode keeps the whole answer if the task is "loud"."""

    transformations = ("one", "another")

    def __init__(self, players: int = 1) -> None:
        self.closed = 0
        self.info = EnvironmentInfo(
            name="halves",
            description="halves",
            prompts=generic_prompts("Be good.", "Say it."),
            max_steps=2,
            max_reward=1.0,
            deterministic=True,
            task_counts={Split.TRAIN: 2, Split.TEST: 0},
            player_count=players,
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        return [TaskInfo(name, split, 1.0) for name in ("quiet", "loud")[offset : offset + limit]]

    def versions(self, split: Split, transformation: str) -> None:
        return None

    def start(self, task_id: str) -> HalvesEpisode:
        return HalvesEpisode(self, task_id == "loud")

    def start_unanswerable(self, task_id: str, transformation: str) -> HalvesEpisode:
        game = HalvesEpisode(self, task_id == "loud")
        game.observation = transformation
        return game

    def close(self) -> None:
        self.closed += 1


class HalvesEpisode:
    def __init__(self, owner: Halves, loud: bool) -> None:
        self.observation = "begin"
        self.reads_thoughts = loud
        self.heard: list[str] = []
        self._owner = owner

    def step(self, action: str) -> StepResult:
        self.heard.append(action)
        return StepResult("on", action, 0.5 * ("good" in action), done=len(self.heard) == 2, feedback="over")

    def close(self) -> None:
        self._owner.closed += 1


@pytest.mark.parametrize(("answers", "reward"), [("good good", 1.0), ("good bad", 0.0), ("bad good", 0.0)])
def test_a_part_of_the_reward_is_no_right_answer(answers: str, reward: float) -> None:
    game = Unanswerable(Halves(), Settings()).start("quiet")
    first, second = map(game.step, answers.split())
    assert (first.reward, second.reward, second.feedback) == (0.0, reward, "over This task had an answer.")


def test_an_environment_that_reads_thoughts_gets_them_and_a_refusal_in_one_does_not_count() -> None:
    environment = Unanswerable(Halves(), Settings())
    game = environment.start("loud" + SUFFIX)
    said = "<think>\\boxed{I don't know}</think> go on"
    assert not act(game, said).done
    assert game._episode.heard == [said]  # type: ignore[attr-defined]
    assert act(game, I_DO_NOT_KNOW).reward == 1.0
    assert not environment.start("quiet").reads_thoughts


def test_the_transformation_is_the_first_or_the_chosen_one() -> None:
    for chosen, expected in (("", "one"), ("another", "another")):
        environment = Unanswerable(Halves(), Settings(transformation=chosen))
        assert environment.start("quiet" + SUFFIX).observation == expected
    with pytest.raises(ValueError, match=r"transformation: .* no 'anothr'; did you mean 'another'"):
        Unanswerable(Halves(), Settings(transformation="anothr"))


def test_what_is_wrapped_is_closed_with_it() -> None:
    wrapped = Halves()
    environment = Unanswerable(wrapped, Settings())
    environment.start("quiet").close()
    environment.close()
    assert wrapped.closed == 2


# Which tasks


def of_entries(versions: Sequence[Versions]) -> Questions:
    """Questions with these versions, all for training."""
    entries = {
        f"{index}": QuestionEntry(
            f"{index}",
            "x",
            f"Question {index}?",
            ("1",) if Versions.ANSWERABLE in one else (),
            unanswerable=f"No question {index}?" if Versions.UNANSWERABLE in one else "",
        )
        for index, one in enumerate(versions)
    }
    return Questions({Split.TRAIN: entries, Split.TEST: {}}, QuestionSettings())


shares = st.one_of(st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]), st.floats(0, 1))


@given(st.integers(0, 60), shares, shares, st.integers())
def test_the_share_is_exact_and_a_smaller_one_is_within_a_larger_one(
    count: int, share: float, other: float, seed: int
) -> None:
    wrapped = of_entries([Versions.BOTH] * count)
    found = []
    for one in sorted((share, other)):
        listed = ids(Unanswerable(wrapped, Settings(share=one, seed=seed)))
        assert [task_id.removesuffix(SUFFIX) for task_id in listed] == [f"train/{index}" for index in range(count)]
        found.append({task_id for task_id in listed if task_id.endswith(SUFFIX)})
        assert abs(len(found[-1]) - one * count) <= 0.5
    assert found[0] <= found[1]


single = st.sampled_from([Versions.ANSWERABLE, Versions.UNANSWERABLE, Versions.BOTH])


@given(st.lists(single, min_size=1, max_size=30), shares)
def test_each_task_is_listed_in_a_version_that_it_has_or_the_share_is_refused(
    versions: list[Versions], share: float
) -> None:
    wrapped = of_entries(versions)
    fewest = versions.count(Versions.UNANSWERABLE)
    most = fewest + versions.count(Versions.BOTH)
    if not fewest <= int(share * len(versions) + 0.5) <= most:
        with pytest.raises(ValueError, match=r"^share: "):
            Unanswerable(wrapped, Settings(share=share))
        return
    environment = Unanswerable(wrapped, Settings(share=share))
    listed = ids(environment)
    assert fewest <= sum(task_id.endswith(SUFFIX) for task_id in listed) <= most
    for task_id in listed:
        assert ("No question" in environment.start(task_id).observation) is task_id.endswith(SUFFIX)
    for index, one in enumerate(versions):
        for version, suffix in ((Versions.ANSWERABLE, ""), (Versions.UNANSWERABLE, SUFFIX)):
            if version not in one:
                with pytest.raises(UnknownTask):
                    environment.start(f"train/{index}{suffix}")


def test_tags_say_which_version_a_task_is() -> None:
    environment: Unanswerable = create("x", {"transformation": "no_right_choice"})
    tasks = environment.list_tasks(Split.TRAIN, 0, 100)
    for task in tasks:
        has_answer = not task.task_id.endswith(SUFFIX)
        choices = {"choices": "4"} if "choice" in task.task_id and has_answer else {}
        assert task.tags == {"answerable": str(has_answer).lower(), **choices}
    assert {task.tags["answerable"] for task in tasks} == {"true", "false"}


def test_an_id_is_the_same_task_under_every_share_and_seed(lakes: Unanswerable) -> None:
    other: Unanswerable = create("others", {**LAKES, "share": 0.1, "seed": 5})
    assert ids(other) != ids(lakes)
    for task_id in ids(lakes):
        assert other.start(task_id).observation == lakes.start(task_id).observation
    # Pinned: the tasks of a share must stay what they were when results were published.
    assert [task_id for task_id in ids(other, Split.TEST) if task_id.endswith(SUFFIX)] == ["test/00003/unanswerable"]


def test_lists_may_be_read_in_parts(lakes: Unanswerable) -> None:
    parts = [task.task_id for first in range(0, 50, 7) for task in lakes.list_tasks(Split.TRAIN, first, 7)]
    assert parts == ids(lakes)


def test_test_tasks_may_have_another_share() -> None:
    environment: Unanswerable = create("x", {"share": 0.1, "test_share": 1})
    assert sum(task_id.endswith(SUFFIX) for task_id in ids(environment)) == 5
    assert all(task_id.endswith(SUFFIX) for task_id in ids(environment, Split.TEST))


@pytest.mark.parametrize("task_id", ["", SUFFIX, "train/x", f"train/00000{SUFFIX}{SUFFIX}", "train/00050" + SUFFIX])
def test_unknown_tasks(lakes: Unanswerable, task_id: str) -> None:
    with pytest.raises(UnknownTask):
        lakes.start(task_id)


# Refusals


@pytest.mark.parametrize(
    ("refusal", "reply", "expected"),
    [
        ("\\boxed{I don't know.}", "\\boxed{I don't know.}", True),
        ("\\boxed{I don't know.}", "So: \\boxed{\\text{i don’t know}}", True),
        ("\\boxed{I don't know.}", "\\boxed{5} no, \\boxed{I don't know.}", True),
        ("\\boxed{I don't know.}", "\\boxed{I don't know.} or \\boxed{5}", False),
        ("\\boxed{I don't know.}", "I don't know.", False),
        ("\\boxed{I don't know.}", "\\boxed{I don't know. 5}", False),
        ("\\boxed{I don't know.}", "\\boxed{I don't know.", False),
        ("```nothing```", "```Nothing```", True),
        ("```nothing```", "```nothing``` or ```Up```", False),
        ("```nothing```", "nothing", False),
        ("<answer>none</answer>", "<answer> None. </answer>", True),
        ("<answer>none</answer>", "none", False),
        ("nothing", "nothing", True),
        ("nothing", " Nothing.\n", True),
        ("nothing", "```nothing```", True),
        ("nothing", "It is \\boxed{nothing}", True),
        ("nothing", "I see nothing", False),
        ("nothing", "```Up``` nothing", False),
        ("nothing", "", False),
    ],
)
def test_which_replies_are_refusals(refusal: str, reply: str, expected: bool) -> None:
    assert RefusalMark(refusal).is_in(reply) is expected


REFUSALS = ("\\boxed{I don't know.}", "```nothing```", "<answer>none</answer>", "nothing")


@given(st.sampled_from(REFUSALS), st.text(max_size=30), st.text(max_size=30))
def test_a_refusal_in_a_thought_is_none(refusal: str, before: str, after: str) -> None:
    assert not RefusalMark(refusal).is_in(f"{before}<think>{refusal}")
    plain = "".join(filter(str.isalnum, after))
    assert not RefusalMark(refusal).is_in(f"<think>{before} {refusal}</think>{plain}".replace("nothing" + plain, plain))


@given(st.sampled_from(REFUSALS), st.text(max_size=60))
def test_any_reply_may_be_asked(refusal: str, reply: str) -> None:
    assert RefusalMark(refusal).is_in(reply) in (True, False)
    assert RefusalMark(refusal).is_in(refusal)


# Settings


def test_the_agent_is_told_how_to_refuse_unless_nothing_is_to_be_said() -> None:
    wrapped = Halves()
    prompts = Unanswerable(wrapped, Settings()).info.prompts
    hint = "If you don't know the answer, reply with \\boxed{I don't know.}"
    told = (prompts.solver, prompts.action_reminder, prompts.retry, prompts.try_again)
    assert all(text.endswith(hint) for text in told)
    assert "no answer" in prompts.reflection_system and prompts.reflection == wrapped.info.prompts.reflection
    assert Unanswerable(wrapped, Settings(hint="")).info.prompts == wrapped.info.prompts


def test_it_describes_itself_as_what_it_wraps_does() -> None:
    environment: Unanswerable = create("mine", {**LAKES, "share": 0.1})
    wrapped = environment.wrapped.info
    same = replace(environment.info, name=wrapped.name, description=wrapped.description)
    assert same == wrapped and environment.info.name == "mine"
    assert environment.info.description.endswith("without an answer: 10% of train, 10% of test")


def test_feedback_is_a_setting_of_the_outer_table() -> None:
    table = {"kind": "unanswerable", "feedback": "unary"}
    environment = EnvSettings(environments={"x": table}).create_environments()["x"]
    assert environment.start("train/number-01" + SUFFIX).step(I_DO_NOT_KNOW).feedback == RIGHT


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wrapped": {"kind": "sokoban"}}, "wrapped.kind: the tasks of 'sokoban' cannot be made unanswerable"),
        (
            {"wrapped": {"kind": "unanswerable"}},
            "wrapped.kind: the tasks of 'unanswerable' cannot be made unanswerable",
        ),
        ({"wrapped": {"kind": "frozenlak"}}, "wrapped: there is no environment 'frozenlak'; did you mean 'frozenlake'"),
        ({"wrapped": {"kind": "frozenlake", "size": 3}}, "wrapped: size: no such setting; did you mean"),
        ({"wrapped": {"kind": "frozenlake", "size_min": 1}}, "wrapped: .*size_min and size_max must satisfy"),
        ({"wrapped": {}}, "wrapped.kind: names the wrapped environment"),
        ({"wrapped": {"kind": "questions", "feedback": "unary"}}, "wrapped.feedback: belongs in the outer table"),
        ({"share": 1.5}, "share must be from 0 to 1, not 1.5"),
        ({"test_share": -1}, "test_share must be from 0 to 1, not -1"),
        ({"share": float("nan")}, "share must be from 0 to 1"),
        ({"refusal": " . "}, "refusal must be a text such as"),
        ({"refusal": "<think>nothing</think>"}, "refusal must be a text such as"),
        ({"transformation": "no_goal"}, "transformation: 'questions' has no 'no_goal'; there are: data"),
    ],
)
def test_a_bad_setting_is_named_when_the_server_starts(settings: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create("x", settings)


def test_a_share_that_cannot_be_had_is_refused_with_what_can_be() -> None:
    versions = [Versions.ANSWERABLE] * 6 + [Versions.UNANSWERABLE] + [Versions.BOTH] * 3
    with pytest.raises(ValueError, match=r"share: 5 of the 10 train tasks .* expected from 0.1 to 0.4"):
        Unanswerable(of_entries(versions), Settings(share=0.5))


def test_a_game_of_several_is_refused_by_name_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Halves] = []

    class Plugin:
        @staticmethod
        def create(name: str, settings: Mapping[str, object]) -> Halves:
            made.append(Halves(players=2))
            return made[0]

    monkeypatch.setattr(Plugins, "find", lambda self, name: Plugin)
    with pytest.raises(ValueError, match="'halves' is a game of several players"):
        unanswerable.create("x", Settings(wrapped={"kind": "halves"}))
    assert made[0].closed == 1
