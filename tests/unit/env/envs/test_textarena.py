"""TextArena's games as environments: whose turn, what each player sees, the game's rewards, and chance."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mulligan.common.types import Split, StepResult
from mulligan.env.envs.textarena import TextArena, TextArenaEpisode
from tests.support.kinds import creator
from tests.support.paths import IMPORT_ROOTS, ROOT

create = creator("textarena")

# Games that draw while they are made, begun and played, also from generators of their own and in global variables.
DRAWING = {"Secretary-v0": "[continue]", "2048-v0": "[left]", "Sokoban-v0": "[up]", "ThreeCardMonte-v0": "[1]"}
ARGUMENTS = {"Sokoban-v0": {"num_boxes": 2}}  # boards with three take ten times as long to draw


def made(id_: str, players: int, **settings: object) -> TextArena:
    arguments = ARGUMENTS.get(id_, {})
    table = {"id": id_, "players": players, "arguments": arguments, "train_tasks": 20, "test_tasks": 5, **settings}
    environment: TextArena = create("game", table)
    return environment


def play(episode: TextArenaEpisode, moves: list[str]) -> list[StepResult]:
    steps: list[StepResult] = []
    for move in moves:
        steps.append(episode.step(move))
        if steps[-1].done:
            break
    return steps


def test_two_players_take_turns_and_see_what_the_other_did() -> None:
    episode = made("TicTacToe-v0", 2).start("train/00000")
    assert episode.player == 0 and "You are Player 0" in episode.observation
    steps = play(episode, ["[0]", "[3]", "[1]", "[4]", "[2]"])
    assert [step.player for step in steps[:-1]] == [1, 0, 1, 0]
    assert "You are Player 1" in steps[0].observation and "You are Player 0" not in steps[0].observation
    assert "[Player 0] [0]" in steps[0].observation
    assert "[Player 1] [3]" in steps[1].observation and "[Player 0] [0]" not in steps[1].observation
    assert "You are" not in steps[1].observation  # the rules come once
    assert [step.rewards for step in steps] == [(0.0, 0.0)] * 4 + [(1.0, -1.0)]
    assert [step.reward for step in steps] == [0.0] * 4 + [1.0]
    assert steps[-1].done and not steps[-1].truncated and "won" in steps[-1].feedback


def test_an_invalid_move_is_tolerated_as_often_as_textarena_does() -> None:
    episode = made("TicTacToe-v0", 2).start("train/00000")
    first, second = play(episode, ["in the middle", "over there"])
    assert first.player == 0 and first.action == "in the middle (invalid)" and not first.done
    assert "attempted an invalid move" in first.observation
    assert second.done and second.action == "over there (invalid)" and second.rewards == (-1.0, 1.0)
    assert second.reward == -1.0


def test_three_players_and_one() -> None:
    steps = play(made("ThreePlayerTicTacToe-v0", 3).start("train/00000"), ["[0]", "[6]", "[12]", "[1]"])
    assert [step.player for step in steps] == [1, 2, 0, 1] and all(len(step.rewards) == 3 for step in steps)
    (step,) = play(made("TowerOfHanoi-v0", 1).start("train/00000"), ["[A C]"])
    assert step.player == 0 and step.rewards == () and step.action == "[A C]"


def test_the_step_limit_ends_a_game_without_rewards() -> None:
    steps = play(made("TicTacToe-v0", 2, max_steps=3).start("train/00000"), ["[0]", "[3]", "[1]", "[4]"])
    assert len(steps) == 3 and steps[-1].truncated and steps[-1].rewards == (0.0, 0.0)
    assert steps[-1].feedback == "The step limit was reached."


def test_a_reward_that_textarena_mixed_up_is_that_of_a_lost_game() -> None:
    steps = play(made("Countdown-v0", 1).start("train/00000"), ["no"] * 5)
    assert steps[-1].done and steps[-1].reward == -1.0


def test_tasks_are_other_seeds_in_each_split() -> None:
    game = made("Secretary-v0", 1)
    tasks = [task.task_id for split in Split for task in game.list_tasks(split, 0, 100)]
    assert len(tasks) == len(set(tasks)) == 25
    assert len({game.start(task).observation for task in tasks}) == 25


def shown(id_: str) -> list[str]:
    """A game of each of some tasks, as an agent sees it."""
    game = made(id_, 1)
    found = []
    for task in ("train/00000", "train/00001", "test/00000"):
        episode = game.start(task)
        found += [episode.observation, *map(repr, play(episode, [DRAWING[id_]] * 4))]
    return found


def test_a_task_is_the_same_in_each_process() -> None:
    code = f"from tests.unit.env.envs.test_textarena import *; print([shown(id_) for id_ in {list(DRAWING)!r}])"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # another than here
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": IMPORT_ROOTS},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output == f"{[shown(id_) for id_ in DRAWING]}\n" and len(output) > 1000


@pytest.mark.parametrize("id_", DRAWING)
def test_episodes_interleaved_in_threads_play_as_alone(id_: str) -> None:
    game = made(id_, 1)
    move = DRAWING[id_]
    tasks = [f"train/{number:05d}" for number in range(4)]
    alone = {task: play(game.start(task), [move] * 4) for task in tasks}
    together: dict[str, list[StepResult]] = {task: [] for task in tasks}
    turns = threading.Barrier(len(tasks))

    def run(task: str) -> None:
        episode = game.start(task)
        for _ in alone[task]:
            turns.wait(30)
            together[task].append(episode.step(move))
        for _ in range(4 - len(alone[task])):
            turns.wait(30)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


@pytest.mark.parametrize("id_", DRAWING)
def test_a_fork_draws_what_the_episode_draws(id_: str) -> None:
    episode = made(id_, 1).start("train/00003")
    play(episode, [DRAWING[id_]])
    copied = episode.fork()
    assert play(copied, [DRAWING[id_]] * 3) == play(episode, [DRAWING[id_]] * 3)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"id": "TicTacToe-v9", "players": 2}, "has no 'TicTacToe-v9'; there are: TicTacToe-v0"),
        ({"id": "TicTacToe-v0"}, "players: "),
        ({"id": "TicTacToe-v0", "players": 3}, "players: TicTacToe-v0 does not begin with 3"),
        ({"id": "GuessWho-v0", "players": 1}, "OPENROUTER_API_KEY"),
        ({"id": "BabyAiText-v0", "players": 1}, "No module named"),
        ({"id": "TicTacToe-v0", "players": 2, "arguments": {"size": 9}}, "cannot be made with arguments {'size': 9}"),
    ],
)
def test_a_game_that_cannot_be_played_here_is_refused_by_name(
    settings: dict[str, object], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"^(id|players): ") as caught:
        create("game", settings)
    assert problem in str(caught.value)


def test_a_game_without_its_data_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    for _ in range(2):  # also when its module is there from the first time
        with pytest.raises(ValueError, match=r"python -m nltk\.downloader .*words"):
            create("game", {"id": "SpellingBee-v0", "players": 2})


def test_a_game_says_nothing_on_the_servers_output(capfd: pytest.CaptureFixture[str]) -> None:
    play(made("LogicPuzzle-v0", 1).start("train/00000"), ["[hello]", "[world]"])
    assert capfd.readouterr() == ("", "")
