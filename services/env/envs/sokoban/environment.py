"""Sokoban with hidden symbols: push boxes onto goals. The agent is not told which letter means what.

As published (arXiv 2602.13949): rooms of side 6–8 with a border of walls, one box, at most 8 moves, reward 1 when the
box is on the goal. Deviations from the reference code:
1. An episode ends after the number of moves that the agent is told (the reference says 64 and ends at 8).
2. The reminder of the second attempt tells no rule (the reference's says when a box can be pushed).
3. A hash of its content decides whether a board is a test board, so no seed can mix the splits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

from mulligan.env.base import EnvironmentInfo, Split, StepResult, TaskInfo
from mulligan.env.envs.sokoban.boards import (
    BOX,
    BOX_ON_GOAL,
    FLOOR,
    GOAL,
    LETTERS,
    PLAYER,
    PLAYER_ON_GOAL,
    WALL,
    SokobanBoard,
    draw_board,
    move,
    offsets,
    solve,
)
from mulligan.env.envs.sokoban.levels import read_levels
from mulligan.env.grid import (
    COMPACT_NO_EFFECT,
    COMPACT_PROMPTS,
    NO_EFFECT,
    PROMPTS,
    TEST_SHARE,
    BoardTasks,
    parse_action,
    reading_of,
    with_limit,
)
from mulligan.env.grid_files import MAX_STEPS, FileTasks
from mulligan.env.numbered import MAX_TASKS


@dataclass(frozen=True, slots=True)
class Settings:
    """The published game by default. `wall_share` is the probability that an inner cell is a wall. With level files
    (`levels.py`), sizes, boxes, `wall_share` and `seed` have no effect; `train_tasks` and `test_tasks` are limits."""

    size_min: int = 6
    size_max: int = 8
    boxes: int = 1
    wall_share: float = 0.0
    max_steps: int = 8
    seed: int = 0
    train_tasks: int = 10_000
    test_tasks: int = 100
    train_file: str = ""
    test_file: str = ""
    symbols: str = LETTERS  # player, player on goal, box, box on goal, goal, floor, wall
    border: bool = True  # whether the outer walls are shown; they are the same on every board of a size
    prompts: str = "published"  # or "compact": the few words that a very small model knows
    name: str = "sokoban"

    def __post_init__(self) -> None:
        if not 5 <= self.size_min <= self.size_max <= 16:
            raise ValueError(
                "size_min and size_max must satisfy 5 <= size_min <= size_max <= 16, "
                f"not {self.size_min}, {self.size_max}"
            )
        if not 1 <= self.boxes <= 4:
            raise ValueError(f"boxes must be between 1 and 4, not {self.boxes}")
        if not 0.0 <= self.wall_share <= 0.5:
            raise ValueError(f"wall_share must be between 0 and 0.5, not {self.wall_share}")
        most = MAX_STEPS if self.from_files else 40  # drawn boards are solved
        if not 1 <= self.max_steps <= most:
            raise ValueError(f"max_steps must be between 1 and {most}, not {self.max_steps}")
        for setting, number in (("train_tasks", self.train_tasks), ("test_tasks", self.test_tasks)):
            if not 0 <= number <= MAX_TASKS:
                raise ValueError(f"{setting} must be between 0 and {MAX_TASKS} (ids have five digits), not {number}")
        if len(self.symbols) != len(LETTERS) or len(set(self.symbols)) != len(LETTERS) or not self.symbols.isalpha():
            raise ValueError(
                "symbols must be seven distinct letters (player, player on goal, box, box on goal, goal, floor, wall), "
                f"not {self.symbols!r}"
            )
        if self.prompts not in ("published", "compact"):
            raise ValueError(f'prompts must be "published" or "compact", not {self.prompts!r}')
        if not self.name:
            raise ValueError("name must not be empty")

    @property
    def from_files(self) -> bool:
        return bool(self.train_file or self.test_file)


class SokobanEpisode:
    def __init__(self, board: SokobanBoard, settings: Settings) -> None:
        self._width = board.width
        self._walls = board.walls
        self._goals = board.goals
        self._cells = board.width * len(board.rows)
        self._state = board.start
        self._offsets = offsets(board.width)
        self._symbols = str.maketrans(LETTERS, settings.symbols)
        self._max_steps = settings.max_steps
        self._border = settings.border
        self._compact = settings.prompts == "compact"
        self._steps = 0
        self._blocked = 0
        self.observation = self._render()

    def step(self, action: str) -> StepResult:
        self._steps += 1
        name = parse_action(action)
        after = move(self._state, self._offsets[name], self._walls) if name else None
        self._state = after or self._state
        self._blocked += name is not None and after is None
        reading = reading_of(name, after is not None)
        no_effect = COMPACT_NO_EFFECT if self._compact else NO_EFFECT
        self.observation = ("" if after else no_effect + "\n") + self._render()
        if self._state[1] == self._goals:
            solved = "reached goal" if self._compact else "Every box is on a goal: solved."
            return StepResult(self.observation, reading, 1.0, done=True, feedback=solved)
        if self._steps >= self._max_steps:
            return StepResult(self.observation, reading, done=True, truncated=True, feedback=self._failure())
        return StepResult(self.observation, reading)

    def fork(self) -> SokobanEpisode:
        return copy(self)  # nothing that it holds ever changes: each move makes a new state

    def _failure(self) -> str:
        if self._compact:
            return "step limit"
        missing = len(self._state[1] - self._goals)
        where = "a box was not on a goal" if missing == 1 else f"{missing} boxes were not on a goal"
        text = f"The step limit was reached while {where}."
        if self._blocked:
            text += f" Moves without effect: {self._blocked}, into a wall or against a box that could not be pushed."
        return text

    def _render(self) -> str:
        player, boxes = self._state
        letters = []
        for cell in range(self._cells):
            on_goal = cell in self._goals
            if cell == player:
                letters.append(PLAYER_ON_GOAL if on_goal else PLAYER)
            elif cell in boxes:
                letters.append(BOX_ON_GOAL if on_goal else BOX)
            else:
                letters.append(WALL if cell in self._walls else GOAL if on_goal else FLOOR)
        rows = [letters[start : start + self._width] for start in range(0, self._cells, self._width)]
        if not self._border:
            rows = [row[1:-1] for row in rows[1:-1]]
        return "\n".join("\t".join(row).translate(self._symbols) for row in rows)


class Sokoban:
    """Starting takes no time: a training board is drawn from its id, test boards on first use. Level files are read at
    once."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        counts = {Split.TRAIN: self.settings.train_tasks, Split.TEST: self.settings.test_tasks}
        self._tasks: BoardTasks[SokobanBoard] | FileTasks[SokobanBoard]
        if self.settings.from_files:
            files = {Split.TRAIN: self.settings.train_file, Split.TEST: self.settings.test_file}
            self._tasks = FileTasks(self.settings.name, files, counts, self.settings.max_steps, read_levels)
            counts = self._tasks.counts
            which = "levels from files"
        else:
            self._tasks = self._drawn(counts)
            boxes = "1 box" if self.settings.boxes == 1 else f"{self.settings.boxes} boxes"
            smallest = self.settings.size_min
            largest = self.settings.size_max
            which = f"{smallest}x{smallest} to {largest}x{largest}, {boxes}"
        compact = self.settings.prompts == "compact"
        self.info = EnvironmentInfo(
            name=self.settings.name,
            description=f"Sokoban with hidden symbols, {which}, {self.settings.max_steps} moves",
            prompts=COMPACT_PROMPTS if compact else with_limit(PROMPTS, self.settings.max_steps),
            max_steps=self.settings.max_steps,
            max_reward=1.0,
            deterministic=True,
            task_counts=counts,
            can_fork=True,
        )

    def _drawn(self, counts: Mapping[Split, int]) -> BoardTasks[SokobanBoard]:
        read = self.settings
        return BoardTasks(
            read.name,
            read.seed,
            counts,
            lambda rng: draw_board(rng, read.size_min, read.size_max, read.boxes, read.wall_share),
            self._solve,
            f"size_min, size_max, boxes, wall_share and max_steps of {read}; one board in {TEST_SHARE} is a test board",
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        return self._tasks.list(split, offset, limit)

    def start(self, task_id: str) -> SokobanEpisode:
        return SokobanEpisode(self.board(task_id), self.settings)

    def board(self, task_id: str) -> SokobanBoard:
        return self._tasks.board(task_id)

    def _solve(self, board: SokobanBoard) -> int | None:
        solution = solve(board, self.settings.max_steps)
        return None if solution is None else len(solution)


def create(name: str, settings: Settings) -> Sokoban:
    """Draws or reads the first boards, so that impossible settings stop the server."""
    sokoban = Sokoban(replace(settings, name=name))
    for split in Split:
        sokoban.list_tasks(split, 0, 1)
    return sokoban
