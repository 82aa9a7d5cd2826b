from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.env.base import Split, UnknownTask
from mulligan.env.envs.frozenlake import Settings
from mulligan.env.envs.frozenlake.boards import LakeBoard
from mulligan.env.envs.frozenlake.environment import FrozenLake, FrozenLakeEpisode
from mulligan.env.grid import parse_action

SMALL = Settings(size_min=3, size_max=3, prompts="compact", name="frozenlake_small")


def episode(*rows: str, symbols: str = "ABCD", max_steps: int = 8, prompts: str = "published") -> FrozenLakeEpisode:
    return FrozenLakeEpisode(LakeBoard(rows), Settings(symbols=symbols, max_steps=max_steps, prompts=prompts))


def act(move: str) -> str:
    return f"I think so.\n```{move}```"


def test_walks_to_the_goal() -> None:
    game = episode("ADD", "CCD", "DDB")
    assert game.observation == "A\tD\tD\nC\tC\tD\nD\tD\tB"
    first = game.step(act("Right"))
    assert (first.observation, first.action) == ("D\tA\tD\nC\tC\tD\nD\tD\tB", "Right")
    assert (first.reward, first.done, first.feedback) == (0.0, False, "")
    game.step(act("right"))
    game.step(act(" DOWN \n"))
    last = game.step(act("Down"))
    assert last.observation == "D\tD\tD\nC\tC\tD\nD\tD\t√"
    assert (last.reward, last.done, last.truncated) == (1.0, True, False)
    assert "reached the goal" in last.feedback


def test_falls_into_a_hole() -> None:
    game = episode("ADD", "CCD", "DDB")
    last = game.step(act("Down"))
    assert last.observation == "D\tD\tD\nX\tC\tD\nD\tD\tB"
    assert (last.reward, last.done, last.truncated) == (0.0, True, False)
    assert "fell into a hole" in last.feedback


def test_walls_and_invalid_answers_cost_a_step_and_are_noticed() -> None:
    game = episode("ADD", "CCD", "DDB", max_steps=3)
    wall = game.step(act("Up"))
    assert wall.action == "Up (no effect)"
    assert wall.observation.endswith("A\tD\tD\nC\tC\tD\nD\tD\tB") and "no effect" in wall.observation
    invalid = game.step("Right")
    assert invalid.action == "invalid" and "no effect" in invalid.observation
    moved = game.step(act("Right"))
    assert "no effect" not in moved.observation
    assert (moved.done, moved.truncated, moved.reward) == (True, True, 0.0)
    assert "limit" in moved.feedback


def test_goal_on_the_last_step_is_a_success() -> None:
    result = episode("AB", "CC", max_steps=1).step(act("Right"))
    assert (result.reward, result.done, result.truncated) == (1.0, True, False)


def test_several_letters_for_holes_and_frozen_tiles() -> None:
    rows = ("ADD", "CDC", "DDB")
    game = episode(*rows, symbols="A B CEG DFH")
    shown = [line.split("\t") for line in game.observation.split("\n")]
    for row, line in zip(rows, shown, strict=True):
        for cell, letter in zip(row, line, strict=True):
            assert letter in {"A": "A", "B": "B", "C": "CEG", "D": "DFH"}[cell]
    assert {letter for line in shown for letter in line} & set("FHEG"), "more than the first letters are in use"
    assert episode(*rows, symbols="A B CEG DFH").observation == game.observation, "the board alone decides"
    game.step("```Right```")
    moved = [line.split("\t") for line in game.observation.split("\n")]
    assert moved[0][1] == "A" and moved[0][0] in "DFH"
    same = [(0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert all(moved[y][x] == shown[y][x] for y, x in same), "a cell keeps its letter"


def test_symbols_change_only_the_rendering() -> None:
    game = episode("AB", "CD", symbols="KLMN")
    assert game.observation == "K\tL\nM\tN"
    assert game.step(act("Down")).observation == "N\tL\nX\tN"
    first, second = (FrozenLake(Settings(symbols=symbols)) for symbols in ("ABCD", "DCBA"))
    assert first.board("train/00007") == second.board("train/00007")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```Up```", "Up"),
        ("```Up``` no, ```down```", "Down"),
        ("```Up``` and an open ```", "Up"),
        ("```\nLeft\n```", "Left"),
        ("``Up``", None),
        ("```Up", None),
        ("```Jump```", None),
        ("```Up``` then ```Jump```", None),
        ("``````", None),
        ("", None),
        ("`" * 1_000_000, None),
        ("```Up```" * 125_000, "Up"),
        ("```" + "U" * 1_000_000 + "```", None),
    ],
)
def test_action_is_the_last_complete_block(text: str, expected: str | None) -> None:
    assert parse_action(text) == expected


@given(st.lists(st.text() | st.text(alphabet="`UpDownLeft RightX√\n\t\0", max_size=40), min_size=8, max_size=8))
def test_any_text_is_an_action(texts: list[str]) -> None:
    game = episode("DCD", "CAC", "DCB")
    for number, text in enumerate(texts, start=1):
        result = game.step(text)
        assert result.done == (number == 8 or "X" in result.observation)
        assert bool(result.feedback) == result.done
        if result.done:
            break


def test_published_boards_are_solvable_within_the_limit_and_of_every_side() -> None:
    lake = FrozenLake()
    tasks = [*lake.list_tasks(Split.TEST, 0, 1000), *lake.list_tasks(Split.TRAIN, 0, 500)]
    assert len(tasks) == 600
    assert all(1 <= task.difficulty <= 8 for task in tasks)
    sides = {len(lake.board(task.task_id).rows) for task in tasks}
    assert sides == set(range(2, 10))


@pytest.mark.parametrize("settings", [Settings(train_tasks=2000), SMALL])
def test_test_boards_are_unique_and_never_training_boards(settings: Settings) -> None:
    lake = FrozenLake(settings)
    tests = [lake.board(task.task_id) for task in lake.list_tasks(Split.TEST, 0, 100)]
    assert len(set(tests)) == 100 and all(board.is_test for board in tests)
    train = [lake.board(f"train/{index:05d}") for index in range(2000)]
    assert not any(board.is_test for board in train)
    assert not set(train) & set(tests)
    other = FrozenLake(Settings(seed=5))
    assert not set(train) & {other.board(f"test/{index:05d}") for index in range(100)}


def test_a_task_is_its_id_on_every_instance() -> None:
    first = FrozenLake(SMALL)
    second = FrozenLake(SMALL)
    second.list_tasks(Split.TRAIN, 100, 20)
    ids = ["train/00042", "train/09999", "test/00007", "test/00099"]
    assert [first.board(task_id) for task_id in ids] == [second.board(task_id) for task_id in reversed(ids)][::-1]
    other = FrozenLake(Settings(size_min=3, size_max=3, seed=1))
    assert [first.board(task_id) for task_id in ids] != [other.board(task_id) for task_id in ids]
    # Pinned: a task must stay what it was when results were published.
    assert first.board("train/00042").rows == ("ADD", "DBD", "DDD")
    assert first.board("test/00007").rows == ("ABD", "DDD", "CDD")


@pytest.mark.parametrize(
    "task_id", ["", "train", "train/", "train/1", "train/10000", "test/00100", "dev/00001", "train/-0001", "test/٠٠٠٠١"]
)
def test_unknown_tasks(task_id: str) -> None:
    with pytest.raises(UnknownTask):
        FrozenLake().start(task_id)


def test_listing_is_bounded_by_the_split() -> None:
    lake = FrozenLake(SMALL)
    assert [task.task_id for task in lake.list_tasks(Split.TEST, 98, 10)] == ["test/00098", "test/00099"]
    assert lake.list_tasks(Split.TEST, 100, 10) == [] == lake.list_tasks(Split.TRAIN, 0, 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size_min": 1}, "size_min"),
        ({"size_min": 5, "size_max": 4}, "size_max"),
        ({"frozen_min": 0.9}, "frozen_max"),
        ({"frozen_max": 1.5}, "frozen_max"),
        ({"max_steps": 0}, "max_steps"),
        ({"train_tasks": -1}, "train_tasks"),
        ({"test_tasks": 100_000}, "test_tasks"),
        ({"symbols": "AABC"}, "symbols"),
        ({"symbols": "ABC"}, "symbols"),
        ({"symbols": "ABCX"}, "symbols"),
        ({"symbols": "A B C"}, "four groups"),
        ({"symbols": "A B CD DE"}, "four groups"),
        ({"symbols": "A B  CD"}, "symbols"),
        ({"symbols": "AE B C D"}, "one letter for the player"),
        ({"symbols": "A B CX D"}, "symbols"),
        ({"symbols": "AB1 "}, "symbols"),
        ({"prompts": "long"}, "prompts"),
        ({"name": ""}, "name"),
        ({"size_max": 2}, "test_tasks"),
    ],
)
def test_settings_errors_name_the_setting(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Settings(**changes)  # type: ignore[arg-type]


def test_boards_that_cannot_be_drawn_are_reported_not_waited_for() -> None:
    settings = Settings(size_min=3, size_max=3, frozen_min=0.999999, frozen_max=0.999999)
    with pytest.raises(ValueError, match="frozen_min"):
        FrozenLake(settings).start("test/00000")


def test_prompts_state_the_true_limit_and_no_meaning() -> None:
    prompts = FrozenLake(Settings(max_steps=5)).info.prompts
    for text in (prompts.solver, prompts.action_reminder, prompts.try_again):
        assert "at most 5 moves" in text and "{" not in text
        assert not any(word in text.lower() for word in ("hole", "goal", "frozen", "player"))
    for placeholder in ("{trace}", "{feedback}", "{reward}", "{memory}"):
        assert placeholder in prompts.reflection
    assert "{observation}" in prompts.trace_turn and "{action}" in prompts.trace_turn
    assert "{trace}" in prompts.retry and "{feedback}" in prompts.retry
