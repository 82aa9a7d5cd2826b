"""FrozenLake with hidden symbols: walk over frozen tiles to a goal, past holes, not being told which letter is which.

Boards are described internally by the canonical letters A–D and rendered in the configured symbols, so that the same
task is the same board whatever the symbols. Train and test are split by a hash of that canonical content: no board can
be in both, whatever the seed.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

from services.env.base import EnvironmentInfo, PromptSet, Split, StepResult, TaskInfo, UnknownTask, read_settings

PLAYER, GOAL, HOLE, FROZEN = "A", "B", "C", "D"
PLAYER_IN_HOLE, PLAYER_ON_GOAL = "X", "√"
MOVES = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}
INVALID = "invalid"
_BY_FOLDED_NAME = {name.casefold(): name for name in MOVES}
_FENCE = "```"
_TEST_SHARE = 10  # one board in ten is a test board
_DRAWS = 4_000  # boards drawn for one task before the settings are declared impossible
_CACHED_BOARDS = 16_384


@dataclass(frozen=True, slots=True)
class FrozenLakeSettings:
    """The published game by default; the embedded variant is `size_min=size_max=3, prompts="compact"`."""

    size_min: int = 2
    size_max: int = 9
    frozen_min: float = 0.6
    frozen_max: float = 0.85
    max_steps: int = 8
    seed: int = 0
    train_tasks: int = 10_000
    test_tasks: int = 100
    symbols: str = "ABCD"  # player, goal, hole, frozen
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
            if not 0 <= number <= 99_999:
                raise ValueError(f"{setting} must be between 0 and 99999 (ids have five digits), not {number}")
        if len(self.symbols) != 4 or len(set(self.symbols)) != 4:
            raise ValueError(
                f"symbols must be four distinct letters (player, goal, hole, frozen), not {self.symbols!r}"
            )
        if not self.symbols.isalpha() or PLAYER_IN_HOLE in self.symbols:
            raise ValueError(f"symbols must be letters other than {PLAYER_IN_HOLE}, not {self.symbols!r}")
        if self.prompts not in ("published", "compact"):
            raise ValueError(f'prompts must be "published" or "compact", not {self.prompts!r}')
        if not self.name:
            raise ValueError("name must not be empty")
        self._check_enough_boards()

    def _check_enough_boards(self) -> None:
        sides = range(self.size_min, min(self.size_max, 5) + 1)  # from 5 on there are always enough
        boards = sum(cells * (cells - 1) * 2 ** (cells - 2) for cells in (side * side for side in sides))
        if self.size_max < 5 and self.test_tasks > boards // (2 * _TEST_SHARE):
            raise ValueError(
                f"test_tasks={self.test_tasks} unique test boards cannot be had from sides {self.size_min} to "
                f"{self.size_max}: raise size_max or lower test_tasks to at most {boards // (2 * _TEST_SHARE)}"
            )


@dataclass(frozen=True, slots=True)
class Board:
    """Rows of canonical letters, as the task begins."""

    rows: tuple[str, ...]

    @property
    def is_test(self) -> bool:
        digest = hashlib.sha256("\n".join(self.rows).encode()).digest()
        return int.from_bytes(digest[:8]) % _TEST_SHARE == 0

    def find(self, letter: str) -> tuple[int, int]:
        for y, row in enumerate(self.rows):
            x = row.find(letter)
            if x >= 0:
                return y, x
        raise ValueError(f"no {letter} on the board")

    def shortest_path(self) -> int | None:
        """Moves from the player to the goal past the holes; None when there is no way."""
        side = len(self.rows)
        start = self.find(PLAYER)
        distances = {start: 0}
        queue = deque([start])
        while queue:
            y, x = queue.popleft()
            if self.rows[y][x] == GOAL:
                return distances[y, x]
            for dy, dx in MOVES.values():
                cell = (y + dy, x + dx)
                inside = 0 <= cell[0] < side and 0 <= cell[1] < side
                if inside and cell not in distances and self.rows[cell[0]][cell[1]] != HOLE:
                    distances[cell] = distances[y, x] + 1
                    queue.append(cell)
        return None


def draw_board(settings: FrozenLakeSettings, rng: random.Random) -> Board:
    """One draw, which may be unsolvable and of either split."""
    side = rng.randint(settings.size_min, settings.size_max)
    frozen = rng.uniform(settings.frozen_min, settings.frozen_max)
    cells = [FROZEN if rng.random() < frozen else HOLE for _ in range(side * side)]
    start, goal = rng.sample(range(side * side), 2)
    cells[start], cells[goal] = PLAYER, GOAL
    return Board(tuple("".join(cells[y * side : (y + 1) * side]) for y in range(side)))


def parse_action(text: str) -> str | None:
    """The move in the last complete triple-backtick block; linear in the length of hostile text."""
    parts = text.split(_FENCE)
    if len(parts) < 3:
        return None
    last_block = parts[-2] if len(parts) % 2 else parts[-3]
    return _BY_FOLDED_NAME.get(last_block.strip().casefold()) if len(last_block) < 64 else None


class FrozenLakeEpisode:
    def __init__(self, board: Board, settings: FrozenLakeSettings) -> None:
        self._cells = [list(row) for row in board.rows]
        self._at = board.find(PLAYER)
        self._texts = _TEXTS[settings.prompts]
        self._symbols = str.maketrans(PLAYER + GOAL + HOLE + FROZEN, settings.symbols)
        self._max_steps = settings.max_steps
        self._steps = 0
        self.observation = self._render()

    def step(self, action: str) -> StepResult:
        self._steps += 1
        move = parse_action(action)
        entered = self._move(move) if move else None
        reading = INVALID if move is None else move if entered else f"{move} (no effect)"
        notice = "" if entered else self._texts.no_effect + "\n"
        self.observation = notice + self._render()
        reward = 1.0 if entered == GOAL else 0.0
        if entered in (GOAL, HOLE):
            feedback = self._texts.reached_goal if entered == GOAL else self._texts.fell
            return StepResult(self.observation, reading, reward, done=True, feedback=feedback)
        if self._steps >= self._max_steps:
            return StepResult(self.observation, reading, done=True, truncated=True, feedback=self._texts.limit)
        return StepResult(self.observation, reading)

    def _move(self, move: str) -> str | None:
        """Moves the player; returns what the entered cell was, or None at a wall."""
        (y, x), (dy, dx) = self._at, MOVES[move]
        to_y, to_x = y + dy, x + dx
        if not (0 <= to_y < len(self._cells) and 0 <= to_x < len(self._cells)):
            return None
        entered = self._cells[to_y][to_x]
        self._cells[y][x] = FROZEN
        self._cells[to_y][to_x] = {HOLE: PLAYER_IN_HOLE, GOAL: PLAYER_ON_GOAL}.get(entered, PLAYER)
        self._at = (to_y, to_x)
        return entered

    def _render(self) -> str:
        return "\n".join("\t".join(row).translate(self._symbols) for row in self._cells)


class FrozenLake:
    """Starts at once: training boards are drawn from their id, test boards on first use."""

    def __init__(self, settings: FrozenLakeSettings | None = None) -> None:
        self.settings = settings or FrozenLakeSettings()
        self._test_boards: tuple[Board, ...] | None = None
        self._lock = threading.Lock()
        self._train_board = lru_cache(_CACHED_BOARDS)(self._draw_train_board)
        counts = {Split.TRAIN: self.settings.train_tasks, Split.TEST: self.settings.test_tasks}
        self.info = EnvironmentInfo(
            name=self.settings.name,
            description=f"FrozenLake with hidden symbols, {self.settings.size_min}x{self.settings.size_min} to "
            f"{self.settings.size_max}x{self.settings.size_max}, {self.settings.max_steps} moves",
            prompts=_TEXTS[self.settings.prompts].prompts(self.settings.max_steps),
            max_steps=self.settings.max_steps,
            max_reward=1.0,
            deterministic=True,
            task_counts=counts,
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        total = self.info.task_counts[split]
        first = max(offset, 0)
        ids = (f"{split}/{index:05d}" for index in range(first, min(total, first + max(limit, 0))))
        return [TaskInfo(task_id, split, float(self.board(task_id).shortest_path() or 0)) for task_id in ids]

    def start(self, task_id: str) -> FrozenLakeEpisode:
        return FrozenLakeEpisode(self.board(task_id), self.settings)

    def board(self, task_id: str) -> Board:
        split, _, digits = task_id.partition("/")
        well_formed = split in tuple(Split) and len(digits) == 5 and digits.isascii() and digits.isdigit()
        if not well_formed or int(digits) >= self.info.task_counts[Split(split)]:
            raise UnknownTask(f"{task_id[:80]!r} is not a task of {self.info.name}")
        return self._train_board(int(digits)) if split == Split.TRAIN else self._tests()[int(digits)]

    def _playable(self, board: Board) -> bool:
        moves = board.shortest_path()
        return moves is not None and moves <= self.settings.max_steps

    def _draw_train_board(self, index: int) -> Board:
        rng = random.Random(f"{self.settings.seed}/train/{index}")
        for _ in range(_DRAWS):
            board = draw_board(self.settings, rng)
            if not board.is_test and self._playable(board):
                return board
        raise self._impossible()

    def _tests(self) -> tuple[Board, ...]:
        with self._lock:
            if self._test_boards is None:
                self._test_boards = self._draw_test_boards()
            return self._test_boards

    def _draw_test_boards(self) -> tuple[Board, ...]:
        rng = random.Random(f"{self.settings.seed}/test")
        found: dict[Board, None] = {}  # a set that keeps its order
        for draws in count(1):
            board = draw_board(self.settings, rng)
            if board.is_test and self._playable(board):
                found[board] = None
            if len(found) == self.settings.test_tasks:
                break
            if draws > _DRAWS * (len(found) + 1):
                raise self._impossible()
        return tuple(found)

    def _impossible(self) -> ValueError:
        return ValueError(
            "no board (or too few different ones) can be drawn under size_min, size_max, frozen_min, frozen_max and "
            f"max_steps of {self.settings}"
        )


def create(name: str, settings: Mapping[str, object]) -> FrozenLake:
    """From a table of the server's configuration. Draws a board, so that impossible settings stop the server."""
    lake = FrozenLake(read_settings(FrozenLakeSettings, {**settings, "name": name}))
    for split in Split:
        lake.list_tasks(split, 0, 1)
    return lake


@dataclass(frozen=True, slots=True)
class _Texts:
    """What the environment says, apart from boards; `{max_steps}` in a solver text is the true limit."""

    no_effect: str
    fell: str
    reached_goal: str
    limit: str
    solver: str
    action_reminder: str
    reflection_system: str
    reflection: str
    memory_empty: str
    trace_turn: str
    retry: str
    try_again: str

    def prompts(self, max_steps: int) -> PromptSet:
        def true_limit(text: str) -> str:
            return text.replace("{max_steps}", str(max_steps))

        return PromptSet(
            solver=true_limit(self.solver),
            action_reminder=true_limit(self.action_reminder),
            reflection_system=self.reflection_system,
            reflection=self.reflection,
            memory_empty=self.memory_empty,
            trace_turn=self.trace_turn,
            retry=true_limit(self.retry),
            try_again=true_limit(self.try_again),
        )


_ACTION_FORMAT = """\
You have at most {max_steps} moves; the episode ends then. End every answer with exactly one action between triple \
backticks: ```Up```, ```Down```, ```Left``` or ```Right```. An answer without such an action changes nothing and \
still costs a move."""

_PUBLISHED = _Texts(
    no_effect="Your last action had no effect: the board is unchanged.",
    fell="The player fell into a hole.",
    reached_goal="The player reached the goal.",
    limit="The step limit was reached without reaching the goal.",
    solver="""\
You are a reasoning agent in a grid world. Each turn shows you the board: one row a line, its cells separated by tabs, \
every cell one symbol. Nobody has told you what the symbols mean or what wins; any rule you believe in may be wrong, \
so check it against what you see.

Before each move:
1. Summarise the state of the board, and what your previous moves did to it.
2. Weigh the two best actions: what you expect of each, and what could go wrong.
3. Choose one.

"""
    + _ACTION_FORMAT,
    action_reminder=_ACTION_FORMAT,
    reflection_system="""\
You study an agent's attempt at a grid world whose symbols and rules were hidden from it, and you write the rule book \
that would have let it succeed. The rule book must help on every board of this game, not only on this one: never write \
down a route or a particular position.""",
    reflection="""\
The attempt, board by board, each with the action that followed; "(no effect)" marks a move that changed nothing, \
"invalid" an answer without a valid action. The last board is how it ended.

{trace}

Feedback: {feedback}
Reward: {reward}

The rule book that served best so far, which may be wrong:
{memory}

Compare each board with the next to find out what the action did to which symbol. Keep what the evidence confirms, \
correct what it contradicts. Then write one rule book between <prompt> and </prompt> that stands alone, with:
- the meaning of each symbol;
- how to read the board;
- the actions and their effects;
- the objective, and what ends an episode;
- the core strategy;
- tactics against the mistakes you saw.""",
    memory_empty="(none yet)",
    trace_turn="Board:\n{observation}\nAction: {action}\n\n",
    retry="""\
You are a reasoning agent in a grid world. This is your first attempt at the board below, which failed; the same board \
starts again now, and you should do better.

{trace}

Feedback: {feedback}

"""
    + _ACTION_FORMAT,
    try_again="""\
You are a reasoning agent in a grid world. You have attempted this board before, and that was wrong. Try again.

"""
    + _ACTION_FORMAT,
)

_COMPACT = _Texts(
    no_effect="blocked",
    fell="fell into hole",
    reached_goal="reached goal",
    limit="step limit",
    solver="play",
    action_reminder="play",
    reflection_system="explain",
    reflection="{trace}\n{feedback}\n{memory}",
    memory_empty="nothing",
    trace_turn="{observation}\n{action}\n",
    retry="{trace}\n{feedback}\nplay",
    try_again="wrong\nplay",
)

_TEXTS = {"published": _PUBLISHED, "compact": _COMPACT}
