"""The adapter for Gymnasium: spaces in words, actions from text, forks, and what is refused at the start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.env.base import Split, UnknownTask
from mulligan.env.envs.gymnasium.actions import read
from mulligan.env.envs.gymnasium.environment import INVALID, Gymnasium, without_escapes
from mulligan.env.load import load
from tests.support.effort import examples
from tests.support.kinds import creator

create = creator("gymnasium")

WORLD = "tests.support.gymnasium_world"
LAKE = {"id": "FrozenLake-v1", "max_reward": 1, "actions": ["Left", "Down", "Right", "Up"]}
EVERYTHING = {"id": "Everything-v0", "module": WORLD, "max_reward": 1}
ACTION = {
    "move": -1,
    "force": [0.7, 1],
    "say": "a b",
    "bits": [0, 1],
    "counts": [1, 2],
    "pair": [1, [[0, 255], [3, 4]]],
    "some": [3, 0],
    "either": [1, "x"],
}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(list(ACTION)), inner, max_size=8),
)


def made(**table: Any) -> Gymnasium:
    environment: Gymnasium = create("game", table)
    return environment


def fenced(action: object) -> str:
    return f"I think\n```json\n{json.dumps(action)}\n```"


@pytest.fixture(scope="module")
def everything() -> Gymnasium:
    return made(**EVERYTHING)


# Toy text and classic control, as they come


def test_what_draws_itself_as_text_is_shown_so() -> None:
    lake = made(**LAKE, arguments={"is_slippery": False})
    assert "Left, Down, Right, Up (or a whole number from 0 to 3)" in lake.info.prompts.action_reminder
    assert (lake.info.max_steps, lake.info.max_reward, lake.info.deterministic) == (100, 1.0, True)
    episode = lake.start("train/00042")
    assert episode.observation == "[S on red]FFF\nFHFH\nFFFH\nHFFG"
    answers = ["```down```", "1", "2", "I go ```Right``` now", "```1```", "right"]
    steps = [episode.step(answer) for answer in answers]
    assert [step.action for step in steps] == ["Down", "Down", "Right", "Right", "Down", "Right"]
    assert [step.reward for step in steps] == [0.0] * 5 + [1.0]
    assert steps[0].observation == "  (Down)\nSFFF\n[F on red]HFH\nFFFH\nHFFG"
    last = steps[-1]
    assert (last.done, last.truncated, last.feedback) == (
        True,
        False,
        "The episode came to its end. Steps: 6. Sum of rewards: 1.",
    )


def test_an_invalid_action_changes_nothing_and_costs_a_step() -> None:
    episode = made(**LAKE, max_steps=2).start("train/00000")
    first = episode.step("jump")
    assert (first.action, first.done, first.reward) == (INVALID, False, 0.0)
    assert first.observation == (
        "That is no valid action: expected Left, Down, Right, Up (or a whole number from 0 to 3). Nothing happened.\n\n"
        "[S on red]FFF\nFHFH\nFFFH\nHFFG"
    )
    last = episode.step("4")
    assert (last.action, last.done, last.truncated) == (INVALID, True, True)
    assert last.feedback == "The step limit was reached. Steps: 2. Sum of rewards: 0."


def test_colours_are_told_in_words() -> None:
    assert without_escapes("a\x1b[34;1mR\x1b[0mb\x1b[42m_\x1b[0m") == "a[R in blue]b[_ on green]"
    assert without_escapes("\x1b[35m\x1b[34;1mR\x1b[0m\x1b[0m|\x1b[31mopen") == "[[R in blue] in magenta]|[open in red]"
    taxi = made(id="Taxi-v4", max_reward=20)
    assert "[  on yellow]" in taxi.start("train/00000").observation
    assert taxi.start("train/00000").observation != taxi.start("train/00001").observation


def test_values_are_shown_where_nothing_is_drawn_or_when_asked_for() -> None:
    parts = {"components": ["your sum", "the dealer's card", "usable ace"], "actions": ["stick", "hit"]}
    game = made(id="Blackjack-v1", max_steps=10, max_reward=1.5, **parts)
    episode = game.start("test/00003")
    assert episode.observation.splitlines()[0].startswith("your sum: ")
    assert len(episode.observation.splitlines()) == 3
    assert episode.step("Stick").done
    cliff = made(id="CliffWalking-v1", max_steps=20, max_reward=0, observation="values")
    assert cliff.start("train/00000").observation == "36"
    assert cliff.start("train/00000").step("0").reward == -1.0


def test_boxes_are_numbers_with_few_digits() -> None:
    names = ["position", "velocity", "angle", "angular velocity"]
    pole = made(id="CartPole-v1", max_reward=500, components=names, digits=2).start("train/00007")
    lines = dict(line.split(": ") for line in pole.observation.splitlines())
    assert list(lines) == names
    assert all(abs(float(number)) < 0.05 and len(number.lstrip("-0.")) <= 2 for number in lines.values())
    car = made(id="MountainCarContinuous-v0", max_reward=100)
    assert "a list of 1: a number from -1 to 1" in car.info.prompts.solver
    episode = car.start("train/00007")
    assert [episode.step(answer).action for answer in ("```[0.5]```", "-1", "[1e0]")] == ["[0.5]", "[-1.0]", "[1.0]"]
    for answer in ("[1.01]", "[NaN]", "Infinity", "[1e999]", '["0.5"]', "[true]", "[0.5, 0.5]", "[[0.5]]", "left"):
        assert episode.step(answer).action == INVALID, answer


# All spaces at once


def test_every_space_is_read_and_shown(everything: Gymnasium) -> None:
    episode = everything.start("train/00000")
    result = episode.step(fenced(ACTION))
    assert json.loads(result.action) == {**ACTION, "force": [0.7, 1.0]}
    assert result.reward == 0.25
    drawn, *rest = result.observation.splitlines()
    assert drawn.startswith("drawn: [0.")
    assert "\n".join(rest) == (
        "either: 1: abc\ngraph:\n  nodes: [1, 4]\n  edges: [0]\n  links: [0, 1]\ngrid:\n  [0, 1]\n  [2, 3]\n"
        "heard: a b\npair: (1, [0, 1])\nsteps: 0"
    )
    said = everything.info.prompts.solver
    for words in (
        '"move": a whole number from -1 to 1',
        '"force": a list of 2: a number from -1 to 0.7; a number from -1 to 2',
        "\"say\": a text of 1 to 8 characters, each one of ' abc'",
        '"bits": a list of 2, each 0 or 1',
        '"counts": a list of 2: a whole number from 0 to 1; a whole number from 0 to 2',
        '"some": a list of any length, each element a whole number from 0 to 3',
        "nested lists of shape 2 x 2, each a whole number from 0 to 255",
        "one of the lists [0, a whole number from 0 to 1]; [1, a text of 1 to 3 characters, each one of ",
    ):
        assert words in said, words


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("move", 2, '"move" must be a whole number from -1 to 1'),
        ("move", True, '"move" must be'),
        ("move", 1.0, '"move" must be'),
        ("force", [0.71, 0], '"force" must be a list of 2'),
        ("force", [0], '"force" must be'),
        ("force", [[0], [0, 1]], '"force" must be'),
        ("force", [10**400, 0], '"force" must be'),
        ("say", "abcd", '"say" must be a text'),
        ("say", 5, '"say" must be a text'),
        ("bits", [0, 2], '"bits" must be a list of 2, each 0 or 1'),
        ("counts", [0.0, 1.0], '"counts" must be'),
        ("pair", [1], '"pair" must be a list of 2'),
        ("pair", [1, [[0, 256], [0, 0]]], "element 2 must be nested lists"),
        ("some", [4], "element 1 must be"),
        ("some", 4, '"some" must be a list'),
        ("either", [2, 0], '"either" must be one of the lists'),
        ("either", [1, ""], "element 2 must be a text"),
    ],
)
def test_what_is_wrong_in_an_action_is_said(everything: Gymnasium, part: str, value: object, problem: str) -> None:
    result = everything.start("train/00000").step(fenced({**ACTION, part: value}))
    assert result.action == INVALID
    assert result.observation.startswith(f"That is no valid action: {problem}")


@pytest.mark.parametrize(
    "answer",
    ["", "[]", "{}", "{", fenced({"move": 1}), fenced({**ACTION, "more": 1}), "[" * 5_000, "```" * 4, "9" * 5_000],
)
def test_what_is_no_action_at_all_is_said(everything: Gymnasium, answer: str) -> None:
    assert everything.start("train/00000").step(answer).action == INVALID


@settings(max_examples=examples(300))
@given(answer=st.text(max_size=60) | JSON.map(json.dumps))
def test_hostile_answers_are_samples_or_are_refused_in_words(everything: Gymnasium, answer: str) -> None:
    actions: Any = everything._actions
    for space in (actions, *actions.values()):
        try:
            action = read(space, answer, ())
        except ValueError:
            continue
        assert space.contains(action)


def test_a_whole_answer_is_the_action_where_actions_are_text() -> None:
    game = made(id="Talk-v0", module=WORLD, max_reward=1)
    assert "Your whole answer is the action: a text of 1 to 20 characters" in game.info.prompts.action_reminder
    episode = game.start("test/00001")
    word = episode.observation
    refused = episode.step("```moon```")
    assert refused.action == INVALID
    answered = episode.step("wrong")
    assert (answered.action, answered.observation) == ("wrong", "(empty)")
    assert episode.step(word).reward == 1.0


# Tasks, forks, determinism


def test_a_task_is_a_seed_and_splits_share_none(everything: Gymnasium) -> None:
    starts = [everything.start(f"{split}/{index:05d}").observation for split in Split for index in range(5)]
    assert len(set(starts)) == 10
    assert everything.start("train/00003").observation == starts[3]
    assert made(**EVERYTHING, seed=1).start("train/00003").observation not in starts
    for task_id in ("train/10000", "test/00100", "train/3", "train/0000３", "dev/00000", "", "train/-0001"):
        with pytest.raises(UnknownTask):
            everything.start(task_id)


@pytest.mark.parametrize(
    ("table", "answers"),
    [
        (LAKE, ["1", "2", "no", "2", "1", "0"]),
        ({"id": "Taxi-v4", "max_reward": 20}, ["0", "1", "no", "4", "3"]),
        ({"id": "CartPole-v1", "max_reward": 500}, ["0", "1", "1", "0", "no", "1"]),
        (EVERYTHING, [fenced(ACTION), "no", fenced(ACTION), fenced({**ACTION, "say": "c"}), fenced(ACTION)]),
    ],
)
def test_a_fork_goes_on_exactly_and_alone(table: dict[str, Any], answers: list[str]) -> None:
    game = made(**table)
    assert game.info.can_fork
    for at in range(len(answers)):
        episode = game.start("train/00011")
        straight = game.start("train/00011")
        steps = [straight.step(answer) for answer in answers[:at]]
        assert [episode.step(answer) for answer in answers[:at]] == steps
        if steps and steps[-1].done:
            break
        copied = episode.fork()
        episode.step(answers[0])  # what is played here changes nothing there
        rest = answers[at:]
        expected = []
        for answer in rest:
            expected.append(straight.step(answer))
            assert copied.step(answer) == expected[-1]
            if expected[-1].done:
                break
        for one in (episode, straight, copied):
            one.close()


def test_what_is_not_deterministic_says_so_and_does_not_fork() -> None:
    info = made(id="Dreams-v0", module=WORLD, max_reward=1).info
    assert (info.deterministic, info.can_fork) == (False, False)


def test_closing_an_episode_closes_its_environment(everything: Gymnasium) -> None:
    one = everything.start("train/00000")
    other = everything.start("train/00000")
    one.close()
    assert (one._env.unwrapped.closed, other._env.unwrapped.closed) == (True, False)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="the bridge is out"):
        made(**EVERYTHING, arguments={"crash": True}).start("train/00000").step(fenced(ACTION))


# What stops the server


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({}, "id: Field required"),
        ({"id": "NoSuchThing-v0", "max_reward": 1}, "id: 'NoSuchThing-v0': Environment `NoSuchThing` doesn't exist"),
        ({"id": "no_such_module:Thing-v0", "max_reward": 1}, "id: 'no_such_module:Thing-v0'"),
        ({"id": "FrozenLake-v1", "max_reward": 1, "module": "no_such_module"}, "module: 'no_such_module' cannot be"),
        ({**LAKE, "arguments": {"colour": "red"}}, "arguments: 'FrozenLake-v1' cannot be made with colour='red'"),
        ({**LAKE, "arguments": {"map_name": "9x9"}}, "arguments: 'FrozenLake-v1' cannot be made with map_name='9x9'"),
        ({"id": "LunarLander-v3", "max_reward": 300}, "id: 'LunarLander-v3' needs more than Gymnasium itself"),
        ({"id": "FrozenLake-v1"}, r"max_reward: set the largest sum .* \(its reward_threshold is 0.7\)"),
        ({"id": "Blackjack-v1", "max_reward": 1}, "max_steps: 'Blackjack-v1' has no limit of its own: set one"),
        ({**LAKE, "actions": ["a", "b"]}, "actions: 2 names, and of 'FrozenLake-v1' there are 4 to name"),
        ({**LAKE, "actions": ["a", "A", "b", "c"]}, "actions must have different names"),
        ({**LAKE, "components": ["a"]}, "components: 1 names, and the observation has 0 that can be named"),
        ({**LAKE, "observation": "pixels"}, 'observation must be "auto", "render" or "values"'),
        ({"id": "CartPole-v1", "max_reward": 500, "observation": "render"}, "observation: .* does not draw itself"),
        ({**LAKE, "prompts": {"solve": "x"}}, "prompts.solve: no such text; there are: solver"),
        ({**LAKE, "train_tasks": 100_000}, "train_tasks must be between 0 and 99999"),
        ({**LAKE, "seed": -1}, "seed must be between 0 and 10000"),
        ({**LAKE, "arguments": {"desc": None, "map_name": None}}, "arguments: with them .* begins differently"),
        ({"id": "Unseeded-v0", "module": WORLD, "max_reward": 1}, "arguments: with them .* begins differently"),
        ({"id": "Pixels-v0", "module": WORLD, "max_reward": 1}, "id: .* arrays of 100800 numbers"),
        ({"id": "Graphs-v0", "module": WORLD, "max_reward": 1}, "id: .* there is a Graph space in them"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_bad_settings_are_named(table: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=rf"environments\.game: (Value error, )?{problem}"):
        load("game", {"kind": "gymnasium", **table})


def test_texts_can_be_replaced() -> None:
    game = made(**LAKE, task="Reach G.", prompts={"try_again": "Once more."})
    assert game.info.prompts.solver.startswith("Reach G.\n\nEnd every answer")
    assert game.info.prompts.try_again == "Once more."


def test_bounds_are_those_that_are_told() -> None:
    """0.7 as a 32-bit number is a little less than 0.7; the agent is told 0.7 and may say so."""
    assert read(spaces.Box(-1, 0.7, (1,)), "0.7", ()) == pytest.approx(0.7)
    with pytest.raises(ValueError, match=r"from -1 to 0\.7$"):
        read(spaces.Box(-1, 0.7, (1,)), "0.700001", ())


@pytest.mark.parametrize(
    ("answer", "names", "action"),
    [
        ("```2```", (), 2),
        ("<answer>2</answer>", (), 2),
        ("\\boxed{2} of 3", (), 2),
        ("The answer is 2.", (), 2),
        ("3 - 1 = 2", (), 2),
        ("Right.", ("left", "up", "right"), 2),
        ("**right**", ("left", "up", "right"), 2),
        ("<answer>right</answer> of 3", ("left", "up", "right"), 2),
    ],
)
def test_a_small_models_answers_are_read(answer: str, names: Sequence[str], action: int) -> None:
    assert read(spaces.Discrete(3), answer, names) == action


@pytest.mark.parametrize(
    ("answer", "names"),
    [("9", ()), ("It is 3.", ()), ("1.5", ()), ("-1", ()), ("there are 2 holes", ("left", "up", "right")), ("", ())],
)
def test_what_is_out_of_bounds_or_no_action_is_refused(answer: str, names: Sequence[str]) -> None:
    with pytest.raises(ValueError, match=r"expected|must be"):
        read(spaces.Discrete(3), answer, names)
