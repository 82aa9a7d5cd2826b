from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.env.base import Split, UnknownTask
from mulligan.env.envs.sokoban.boards import LETTERS, SokobanBoard, draw_board, solve
from mulligan.env.envs.sokoban.environment import Settings, Sokoban, SokobanEpisode
from tests.support.effort import examples
from tests.support.kinds import creator
from tests.support.paths import IMPORT_ROOTS, ROOT

create = creator("sokoban")

STEPS = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}


def board(*inner: str) -> SokobanBoard:
    """With a border of walls around it."""
    side = len(inner[0]) + 2
    return SokobanBoard(("E" * side, *(f"E{row}E" for row in inner), "E" * side))


def episode(*inner: str, **changes: object) -> SokobanEpisode:
    return SokobanEpisode(board(*inner), Settings(**changes))  # type: ignore[arg-type]


def act(move: str) -> str:
    return f"I think so.\n```{move}```"


def shown(*inner: str) -> str:
    return "\n".join("\t".join(row) for row in board(*inner).rows)


def brute_force(start: SokobanBoard, max_moves: int) -> int | None:
    """Moves of the shortest solution, by looking at everything that can happen, level by level."""
    at = {
        letter: {(y, x) for y, row in enumerate(start.rows) for x, c in enumerate(row) if c == letter}
        for letter in LETTERS
    }
    walls = at["E"]
    goals = at["C"] | at["a"] | at["b"]
    (player,) = at["A"] | at["a"]
    level = {(player, frozenset(at["B"] | at["b"]))}
    seen = set(level)
    for moves in range(max_moves + 1):
        if any(boxes <= goals for _, boxes in level):
            return moves
        following = set()
        for (y, x), boxes in level:
            for dy, dx in STEPS.values():
                to = (y + dy, x + dx)
                behind = (y + 2 * dy, x + 2 * dx)
                if to in walls or (to in boxes and (behind in walls or behind in boxes)):
                    continue
                following.add((to, frozenset(behind if box == to else box for box in boxes)))
        level = following - seen
        seen |= level
    return None


def test_pushes_the_box_onto_the_goal() -> None:
    game = episode("ADDD", "DBDD", "DDDD", "DDDC")
    assert game.observation == shown("ADDD", "DBDD", "DDDD", "DDDC")
    first = game.step(act("Right"))
    assert (first.observation, first.action) == (shown("DADD", "DBDD", "DDDD", "DDDC"), "Right")
    assert (first.reward, first.done, first.feedback) == (0.0, False, "")
    assert game.step(act(" down \n")).observation == shown("DDDD", "DADD", "DBDD", "DDDC")
    game.step(act("DOWN"))
    for name in ("Left", "Down", "Right"):
        game.step(act(name))
    last = game.step(act("Right"))
    assert last.observation == shown("DDDD", "DDDD", "DDDD", "DDAb")
    assert (last.reward, last.done, last.truncated) == (1.0, True, False)
    assert "solved" in last.feedback


def test_on_goals_other_letters_are_shown() -> None:
    game = episode("ACDD", "DDDD", "DBCD", "DDDD", boxes=2)
    assert game.step(act("Right")).observation == shown("DaDD", "DDDD", "DBCD", "DDDD")
    game = episode("ABCDC", "DDBDD", "DDDDD", "DDDDD", "DDDDD", boxes=2)
    result = game.step(act("Right"))
    assert result.observation == shown("DAbDC", "DDBDD", "DDDDD", "DDDDD", "DDDDD")
    assert not result.done


def test_walls_blocked_boxes_and_invalid_answers_cost_a_move_and_are_noticed() -> None:
    game = episode("ABDC", "DDDD", "DDDD", "DDDD", max_steps=4)
    wall = game.step(act("Up"))
    assert wall.action == "Up (no effect)"
    assert "no effect" in wall.observation and wall.observation.endswith(shown("ABDC", "DDDD", "DDDD", "DDDD"))
    invalid = game.step("Right")
    assert invalid.action == "invalid" and "no effect" in invalid.observation
    moved = game.step(act("Right"))
    assert moved.observation == shown("DABC", "DDDD", "DDDD", "DDDD")
    last = game.step(act("Up"))
    assert (last.done, last.truncated, last.reward) == (True, True, 0.0)
    assert "limit" in last.feedback and "Moves without effect: 2" in last.feedback


@pytest.mark.parametrize("inner", [("ABED", "DDDC", "DDDD", "DDDD"), ("ABBD", "CCDD", "DDDD", "DDDD")])
def test_a_box_is_not_pushed_into_a_wall_or_another_box(inner: tuple[str, ...]) -> None:
    result = episode(*inner).step(act("Right"))
    assert result.action == "Right (no effect)" and result.observation.endswith(shown(*inner))


def test_solving_on_the_last_move_is_a_success() -> None:
    result = episode("ABCD", "DDDD", "DDDD", "DDDD", max_steps=1).step(act("Right"))
    assert (result.reward, result.done, result.truncated) == (1.0, True, False)


def test_symbols_change_only_the_rendering() -> None:
    game = episode("ABCD", "DDDD", "DDDD", "DDDD", symbols="PpQqRST")
    assert game.observation.splitlines()[1] == "T\tP\tQ\tR\tS\tT"
    assert game.step(act("Right")).observation.splitlines()[1] == "T\tS\tP\tq\tS\tT"
    first, second = (Sokoban(Settings(symbols=symbols)) for symbols in ("AaBbCDE", "EDCbBaA"))
    assert first.board("train/00007") == second.board("train/00007")


def test_without_its_border_a_room_is_its_inner_cells() -> None:
    game = episode("ABCD", "DEDD", "DDDD", "DDDD", border=False)
    assert game.observation == "A\tB\tC\tD\nD\tE\tD\tD\nD\tD\tD\tD\nD\tD\tD\tD"
    assert game.step(act("Up")).observation.splitlines()[1:] == game.observation.splitlines()[1:]
    solved = game.step(act("Right"))
    assert (solved.reward, solved.observation.splitlines()[0]) == (1.0, "D\tA\tb\tD")
    corridor = SokobanEpisode(SokobanBoard(("EEEEE", "EABCE", "EEEEE")), Settings(border=False))
    assert corridor.observation == "A\tB\tC"


def test_compact_texts_are_a_few_words() -> None:
    prompts = Sokoban(Settings(prompts="compact")).info.prompts
    assert (prompts.solver, prompts.action_reminder, prompts.reflection_system) == ("play", "play", "explain")
    game = episode("ABDC", "DDDD", "DDDD", "DDDD", prompts="compact", max_steps=3)
    assert game.step(act("Up")).observation == "blocked\n" + shown("ABDC", "DDDD", "DDDD", "DDDD")
    assert game.step(act("Right")).observation == shown("DABC", "DDDD", "DDDD", "DDDD")
    assert game.fork().step(act("Down")).feedback == "step limit"
    assert game.step(act("Right")).feedback == "reached goal"


@given(st.lists(st.text() | st.sampled_from([act(name) for name in STEPS]), min_size=8, max_size=8))
def test_any_text_is_an_action(texts: list[str]) -> None:
    game = episode("DDDD", "DADD", "DBDD", "DDCD")
    for number, text in enumerate(texts, start=1):
        result = game.step(text)
        cells = result.observation.replace("\n", "\t").split("\t")
        assert sum(cell in ("A", "a") for cell in cells) == 1
        assert sum(cell in ("B", "b") for cell in cells) == 1
        assert result.done == (number == 8 or "b" in cells)
        assert bool(result.feedback) == result.done
        if result.done:
            break


@settings(max_examples=examples(150))
@given(
    seed=st.integers(0, 2**32),
    boxes=st.integers(1, 2),
    wall_share=st.sampled_from([0.0, 0.0, 0.2]),
    max_moves=st.integers(1, 12),
)
def test_the_solver_finds_what_brute_force_finds(seed: int, boxes: int, wall_share: float, max_moves: int) -> None:
    drawn = draw_board(random.Random(seed), 5, 6, boxes, wall_share)
    solution = solve(drawn, max_moves)
    assert (None if solution is None else len(solution)) == brute_force(drawn, max_moves)
    if solution:
        game = SokobanEpisode(drawn, Settings(size_min=5, boxes=boxes, max_steps=max_moves))
        results = [game.step(act(name)) for name in solution]
        assert [result.reward for result in results] == [0.0] * (len(solution) - 1) + [1.0]


def test_a_dead_end_is_seen_to_be_one() -> None:
    corner = board("BDDD", "DADD", "DDDD", "DDDC")
    assert solve(corner, 40) is None
    assert solve(board("ABCD", "DDDD", "DDDD", "DDDD"), 1) == ("Right",)


def test_published_boards_are_solvable_within_the_limit_and_of_every_side() -> None:
    sokoban = Sokoban()
    tasks = [*sokoban.list_tasks(Split.TEST, 0, 1000), *sokoban.list_tasks(Split.TRAIN, 0, 500)]
    assert len(tasks) == 600
    assert {task.difficulty for task in tasks} == {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}
    assert {sokoban.board(task.task_id).width for task in tasks} == {6, 7, 8}
    for task in tasks[::7]:
        found = sokoban.board(task.task_id)
        assert task.difficulty == brute_force(found, 8)
        assert (len(found.cells("A")), len(found.cells("B")), len(found.cells("C"))) == (1, 1, 1)
        assert len(found.walls) == 4 * (found.width - 1)


def test_test_boards_are_unique_and_never_training_boards() -> None:
    sokoban = Sokoban()
    tests = [sokoban.board(f"test/{index:05d}") for index in range(100)]
    assert len(set(tests)) == 100 and all(board.is_test for board in tests)
    train = [sokoban.board(f"train/{index:05d}") for index in range(3000)]
    assert not any(board.is_test for board in train)
    other = Sokoban(Settings(seed=5))
    assert not set(train) & {other.board(f"test/{index:05d}") for index in range(100)}


def test_a_task_is_its_id_on_every_machine() -> None:
    first = Sokoban()
    ids = ["train/00042", "train/09999", "test/00007", "test/00099"]
    boards = [first.board(task_id).rows for task_id in ids]
    code = (
        "from mulligan.env.envs.sokoban.environment import Sokoban; s = Sokoban(); "
        f"print([s.board(i).rows for i in {ids[::-1]!r}])"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": IMPORT_ROOTS},
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.strip() == repr(boards[::-1])
    assert boards != [Sokoban(Settings(seed=1)).board(task_id).rows for task_id in ids]
    # Pinned: a task must stay what it was when results were published.
    assert boards[0] == (
        *("EEEEEEEE", "EDDDDDDE", "EDDDDADE", "EDDDDDDE"),
        *("EBDDDDDE", "ECDDDDDE", "EDDDDDDE", "EEEEEEEE"),
    )
    assert boards[2] == ("EEEEEE", "EDDDDE", "EDDDDE", "EDDDDE", "EACBDE", "EEEEEE")


@pytest.mark.parametrize("task_id", ["", "train", "train/1", "train/10000", "test/00100", "dev/00001", "test/٠٠٠٠١"])
def test_unknown_tasks(task_id: str) -> None:
    with pytest.raises(UnknownTask):
        Sokoban().start(task_id)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size_min": 4}, "size_min"),
        ({"size_min": 7, "size_max": 6}, "size_max"),
        ({"boxes": 0}, "boxes"),
        ({"wall_share": 0.9}, "wall_share"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": 41}, "max_steps"),
        ({"train_tasks": -1}, "train_tasks"),
        ({"test_tasks": 100_000}, "test_tasks"),
        ({"symbols": "ABCD"}, "symbols"),
        ({"symbols": "AaBbCD "}, "symbols"),
        ({"symbols": "AABbCDE"}, "symbols"),
        ({"prompts": "long"}, "prompts"),
        ({"name": ""}, "name"),
    ],
)
def test_settings_errors_name_the_setting(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Settings(**changes)  # type: ignore[arg-type]


def test_boards_that_cannot_be_drawn_are_reported_when_the_server_starts() -> None:
    with pytest.raises(ValueError, match="too few different ones"):
        create("sokoban", {"size_min": 5, "size_max": 5, "max_steps": 1})


def test_prompts_state_the_true_limit_and_no_meaning() -> None:
    prompts = Sokoban(Settings(max_steps=12)).info.prompts
    for text in (prompts.solver, prompts.action_reminder, prompts.try_again):
        assert "at most 12 moves" in text and "{" not in text
        assert not any(word in text.lower() for word in ("push", "box", "goal", "wall", "player"))
