"""FrozenLake with hidden symbols: walk over frozen tiles to a goal, around holes. The agent is not told which letter
means what.

Inside, boards are written in the canonical letters A–D. They are shown in the configured symbols, so a task is the same
board with any symbols.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

from mulligan.env.base import EnvironmentInfo, PromptSet, Split, StepResult, TaskInfo
from mulligan.env.envs.frozenlake.boards import FROZEN, GOAL, HOLE, PLAYER, LakeBoard
from mulligan.env.envs.frozenlake.maps import read_maps
from mulligan.env.grid import (
    COMPACT_NO_EFFECT,
    COMPACT_PROMPTS,
    MOVES,
    NO_EFFECT,
    PROMPTS,
    TEST_SHARE,
    BoardTasks,
    parse_action,
    reading_of,
    with_limit,
)
from mulligan.env.grid_files import FileTasks
from mulligan.env.numbered import MAX_TASKS

PLAYER_IN_HOLE = "X"
PLAYER_ON_GOAL = "√"


@dataclass(frozen=True, slots=True)
class Settings:
    """The published game by default; the embedded variant is `size_min=size_max=3, prompts="compact"`. With map files
    (`maps.py`), sizes, shares and `seed` have no effect, and `train_tasks` and `test_tasks` are limits."""

    size_min: int = 2
    size_max: int = 9
    frozen_min: float = 0.6
    frozen_max: float = 0.85
    max_steps: int = 8
    seed: int = 0
    train_tasks: int = 10_000
    test_tasks: int = 100
    train_file: str = ""
    test_file: str = ""
    symbols: str = "ABCD"  # player, goal, hole, frozen; or with several for holes and frozen tiles: "A B CEG DFH"
    prompts: str = "published"  # or "compact": the few words that a very small model knows
    name: str = "frozenlake"

    def __post_init__(self) -> None:
        if not 2 <= self.size_min <= self.size_max <= 32:
            raise ValueError(
                "size_min and size_max must satisfy 2 <= size_min <= size_max <= 32, "
                f"not {self.size_min}, {self.size_max}"
            )
        if not 0.0 < self.frozen_min <= self.frozen_max < 1.0:
            raise ValueError(
                "frozen_min and frozen_max must satisfy 0 < frozen_min <= frozen_max < 1, "
                f"not {self.frozen_min}, {self.frozen_max}"
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, not {self.max_steps}")
        for setting, number in (("train_tasks", self.train_tasks), ("test_tasks", self.test_tasks)):
            if not 0 <= number <= MAX_TASKS:
                raise ValueError(f"{setting} must be between 0 and 99999 (ids have five digits), not {number}")
        self._check_symbols()
        if self.prompts not in ("published", "compact"):
            raise ValueError(f'prompts must be "published" or "compact", not {self.prompts!r}')
        if not self.name:
            raise ValueError("name must not be empty")
        if not self.from_files:
            self._check_enough_boards()

    @property
    def symbol_groups(self) -> list[str]:
        """The letters of player, goal, holes and frozen tiles."""
        return self.symbols.split(" ") if " " in self.symbols else [*self.symbols]

    def _check_symbols(self) -> None:
        groups = self.symbol_groups
        letters = "".join(groups)
        if len(groups) != 4 or len(set(letters)) != len(letters):
            raise ValueError(
                "symbols must be four distinct letters (player, goal, hole, frozen), or four groups of distinct "
                f'letters as in "A B CEG DFH", not {self.symbols!r}'
            )
        if len(groups[0]) != 1 or len(groups[1]) != 1:
            raise ValueError(f"symbols must have one letter for the player and one for the goal, not {self.symbols!r}")
        if not letters.isalpha() or not all(groups) or PLAYER_IN_HOLE in letters:
            raise ValueError(f"symbols must be letters other than {PLAYER_IN_HOLE}, not {self.symbols!r}")

    @property
    def from_files(self) -> bool:
        return bool(self.train_file or self.test_file)

    def _check_enough_boards(self) -> None:
        sides = range(self.size_min, min(self.size_max, 5) + 1)  # from 5 on there are always enough
        boards = sum(cells * (cells - 1) * 2 ** (cells - 2) for cells in (side * side for side in sides))
        if self.size_max < 5 and self.test_tasks > boards // (2 * TEST_SHARE):
            raise ValueError(
                f"test_tasks={self.test_tasks} unique test boards cannot be had from sides {self.size_min} to "
                f"{self.size_max}: raise size_max or lower test_tasks to at most {boards // (2 * TEST_SHARE)}"
            )


def draw_board(settings: Settings, rng: random.Random) -> LakeBoard:
    """Draws one board. It may be unsolvable, and may belong to either split."""
    side = rng.randint(settings.size_min, settings.size_max)
    frozen = rng.uniform(settings.frozen_min, settings.frozen_max)
    cells = [FROZEN if rng.random() < frozen else HOLE for _ in range(side * side)]
    start, goal = rng.sample(range(side * side), 2)
    cells[start] = PLAYER
    cells[goal] = GOAL
    return LakeBoard(tuple("".join(cells[y * side : (y + 1) * side]) for y in range(side)))


class FrozenLakeEpisode:
    def __init__(self, board: LakeBoard, settings: Settings) -> None:
        self._cells = [list(row) for row in board.rows]
        self._at = board.find(PLAYER)
        self._texts = _TEXTS[settings.prompts]
        self._symbols = _symbols(board, settings)
        # Where holes or frozen tiles have several letters, the cell decides which one is shown.
        self._shown = [
            [table.get(cell, cell) for cell, table in zip(row, tables, strict=True)]
            for row, tables in zip(self._cells, self._symbols, strict=True)
        ]
        self._max_steps = settings.max_steps
        self._steps = 0
        self.observation = self._render()

    def step(self, action: str) -> StepResult:
        self._steps += 1
        move = parse_action(action)
        entered = self._move(move) if move else None
        reading = reading_of(move, bool(entered))
        notice = "" if entered else self._texts.no_effect + "\n"
        self.observation = notice + self._render()
        reward = 1.0 if entered == GOAL else 0.0
        if entered in (GOAL, HOLE):
            feedback = self._texts.reached_goal if entered == GOAL else self._texts.fell
            return StepResult(self.observation, reading, reward, done=True, feedback=feedback)
        if self._steps >= self._max_steps:
            return StepResult(self.observation, reading, done=True, truncated=True, feedback=self._texts.limit)
        return StepResult(self.observation, reading)

    def fork(self) -> FrozenLakeEpisode:
        copied = copy(self)
        copied._cells = [list(row) for row in self._cells]
        copied._shown = [list(row) for row in self._shown]
        return copied

    def _move(self, move: str) -> str | None:
        """Moves the player. Returns the letter of the entered cell, or None at a wall."""
        (y, x), (dy, dx) = self._at, MOVES[move]
        to_y = y + dy
        to_x = x + dx
        if not (0 <= to_y < len(self._cells) and 0 <= to_x < len(self._cells[0])):
            return None
        entered = self._cells[to_y][to_x]
        self._put(y, x, FROZEN)
        self._put(to_y, to_x, {HOLE: PLAYER_IN_HOLE, GOAL: PLAYER_ON_GOAL}.get(entered, PLAYER))
        self._at = (to_y, to_x)
        return entered

    def _put(self, y: int, x: int, cell: str) -> None:
        self._cells[y][x] = cell
        self._shown[y][x] = self._symbols[y][x].get(cell, cell)

    def _render(self) -> str:
        return "\n".join(map("\t".join, self._shown))


def _symbols(board: LakeBoard, settings: Settings) -> list[list[dict[str, str]]]:
    """The letters of each cell, by the canonical ones. They depend on the board alone."""
    player, goal, holes, frozen = settings.symbol_groups
    if len(holes) == len(frozen) == 1:
        same = {PLAYER: player, GOAL: goal, HOLE: holes, FROZEN: frozen}
        return [[same] * len(row) for row in board.rows]
    draws = random.Random("".join(board.rows))
    return [
        [{PLAYER: player, GOAL: goal, HOLE: draws.choice(holes), FROZEN: draws.choice(frozen)} for _ in row]
        for row in board.rows
    ]


class FrozenLake:
    """Starting takes no time: a training board is drawn from its id, test boards on first use. Map files are read at
    once."""

    transformations = ("no_goal",)  # a frozen tile in its place

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        counts = {Split.TRAIN: self.settings.train_tasks, Split.TEST: self.settings.test_tasks}
        self._tasks: BoardTasks[LakeBoard] | FileTasks[LakeBoard]
        if self.settings.from_files:
            files = {Split.TRAIN: self.settings.train_file, Split.TEST: self.settings.test_file}
            self._tasks = FileTasks(self.settings.name, files, counts, self.settings.max_steps, read_maps)
            counts = self._tasks.counts
            which = "maps from files"
        else:
            self._tasks = self._drawn(counts)
            smallest = self.settings.size_min
            largest = self.settings.size_max
            which = f"{smallest}x{smallest} to {largest}x{largest}"
        self.info = EnvironmentInfo(
            name=self.settings.name,
            description=f"FrozenLake with hidden symbols, {which}, {self.settings.max_steps} moves",
            prompts=with_limit(_TEXTS[self.settings.prompts].prompts, self.settings.max_steps),
            max_steps=self.settings.max_steps,
            max_reward=1.0,
            deterministic=True,
            task_counts=counts,
            can_fork=True,
        )

    def _drawn(self, counts: Mapping[Split, int]) -> BoardTasks[LakeBoard]:
        return BoardTasks(
            self.settings.name,
            self.settings.seed,
            counts,
            lambda rng: draw_board(self.settings, rng),
            self._solve,
            f"size_min, size_max, frozen_min, frozen_max and max_steps of {self.settings}",
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        return self._tasks.list(split, offset, limit)

    def start(self, task_id: str) -> FrozenLakeEpisode:
        return FrozenLakeEpisode(self.board(task_id), self.settings)

    def versions(self, split: Split, transformation: str) -> None:
        """Every board can lose its goal."""

    def start_unanswerable(self, task_id: str, transformation: str) -> FrozenLakeEpisode:
        rows = self.board(task_id).rows
        return FrozenLakeEpisode(LakeBoard(tuple(row.replace(GOAL, FROZEN) for row in rows)), self.settings)

    def board(self, task_id: str) -> LakeBoard:
        return self._tasks.board(task_id)

    def _solve(self, board: LakeBoard) -> int | None:
        moves = board.shortest_path()
        return moves if moves is not None and moves <= self.settings.max_steps else None


def create(name: str, settings: Settings) -> FrozenLake:
    """Draws or reads the first boards, so that impossible settings stop the server."""
    lake = FrozenLake(replace(settings, name=name))
    for split in Split:
        lake.list_tasks(split, 0, 1)
    return lake


@dataclass(frozen=True, slots=True)
class _Texts:
    """All texts of the environment except boards."""

    no_effect: str
    fell: str
    reached_goal: str
    limit: str
    prompts: PromptSet


_PUBLISHED = _Texts(
    no_effect=NO_EFFECT,
    fell="The player fell into a hole.",
    reached_goal="The player reached the goal.",
    limit="The step limit was reached without reaching the goal.",
    prompts=PROMPTS,
)

_COMPACT = _Texts(
    no_effect=COMPACT_NO_EFFECT,
    fell="fell into hole",
    reached_goal="reached goal",
    limit="step limit",
    prompts=COMPACT_PROMPTS,
)

_TEXTS = {"published": _PUBLISHED, "compact": _COMPACT}
