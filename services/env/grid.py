"""Shared by grid games: moves in triple backticks, boards as tasks, and the published prompts.

Tasks are numbered. A training board is drawn from its number alone; test boards are drawn in order, each once. A hash
of its content decides whether a board is a test board, so none is in both splits, whatever the seed. A task is the same
board on every machine.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import count
from typing import Generic, Protocol, TypeVar

from mulligan.env import numbered
from mulligan.env.answers import fenced
from mulligan.env.base import PromptSet, Split, TaskInfo

MOVES = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}
INVALID = "invalid"
NO_EFFECT = "Your last action had no effect: the board is unchanged."
_BY_FOLDED_NAME = {name.casefold(): name for name in MOVES}
TEST_SHARE = 10  # one board in ten is a test board
_DRAWS = 4_000  # draws per task before the settings are refused as impossible
_CACHED_BOARDS = 16_384


def parse_action(text: str) -> str | None:
    """The move in the last complete triple-backtick block outside thoughts. Linear in the length of hostile text."""
    block = fenced(text)
    return _BY_FOLDED_NAME.get(block.strip().casefold()) if block is not None and len(block) < 64 else None


def reading_of(move: str | None, effective: bool) -> str:
    """The form of an action in a trace: "Up", "Up (no effect)" or "invalid"."""
    return INVALID if move is None else move if effective else f"{move} (no effect)"


def is_test(rows: Sequence[str]) -> bool:
    """Whether a board belongs to the test split, by a hash of its content in canonical letters."""
    digest = hashlib.sha256("\n".join(rows).encode()).digest()
    return int.from_bytes(digest[:8]) % TEST_SHARE == 0


class GridBoard(Protocol):
    """A board. Equal boards are equal tasks."""

    @property
    def is_test(self) -> bool: ...

    def __hash__(self) -> int: ...


B = TypeVar("B", bound=GridBoard)


class BoardTasks(Generic[B]):
    """The tasks of a grid game: `train/00000`, …, `test/00000`, …

    `draw` makes a board from random numbers. `solve` returns the length of the shortest solution, or None if the board
    cannot be won within the game's limit; such a board is drawn again. `settings` is the text that the ValueError names
    if no board, or too few different ones, can be drawn.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        counts: Mapping[Split, int],
        draw: Callable[[random.Random], B],
        solve: Callable[[B], int | None],
        settings: str,
    ) -> None:
        self._name = name
        self._seed = seed
        self._counts = counts
        self._draw = draw
        self._settings = settings
        self._test_boards: tuple[B, ...] | None = None
        self._lock = threading.Lock()
        self._train_board = lru_cache(_CACHED_BOARDS)(self._draw_train_board)
        self._solve = lru_cache(_CACHED_BOARDS)(solve)

    def list(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        """Tasks of a split; the difficulty is the length of the shortest solution."""
        ids = numbered.ids(split, offset, limit, self._counts)
        return [TaskInfo(task_id, split, float(self._solve(self.board(task_id)) or 0)) for task_id in ids]

    def board(self, task_id: str) -> B:
        """Raises UnknownTask."""
        split, number = numbered.read_id(task_id, self._counts, self._name)
        return self._train_board(number) if split is Split.TRAIN else self._tests()[number]

    def _draw_train_board(self, index: int) -> B:
        rng = random.Random(f"{self._seed}/train/{index}")
        for _ in range(_DRAWS):
            board = self._draw(rng)
            if not board.is_test and self._solve(board) is not None:
                return board
        raise self._impossible()

    def _tests(self) -> tuple[B, ...]:
        with self._lock:
            if self._test_boards is None:
                self._test_boards = self._draw_test_boards()
            return self._test_boards

    def _draw_test_boards(self) -> tuple[B, ...]:
        rng = random.Random(f"{self._seed}/test")
        found: dict[B, None] = {}  # a set that keeps its order
        for draws in count(1):
            board = self._draw(rng)
            if board.is_test and self._solve(board) is not None:
                found[board] = None
            if len(found) == self._counts[Split.TEST]:
                break
            if draws > _DRAWS * (len(found) + 1):
                raise self._impossible()
        return tuple(found)

    def _impossible(self) -> ValueError:
        return ValueError(f"no board (or too few different ones) can be drawn under {self._settings}")


ACTION_FORMAT = """\
You have at most {max_steps} moves; the episode ends then. End every answer with exactly one action between triple \
backticks: ```Up```, ```Down```, ```Left``` or ```Right```. An answer without such an action changes nothing and \
still costs a move."""

# `with_limit` fills in `{max_steps}`. Nothing here tells what a symbol means.
PROMPTS = PromptSet(
    solver="""\
You are a reasoning agent in a grid world. Each turn shows you the board: one row a line, its cells separated by tabs, \
every cell one symbol. Nobody has told you what the symbols mean or what wins; any rule you believe in may be wrong, \
so check it against what you see.

Before each move:
1. Summarise the state of the board, and what your previous moves did to it.
2. Weigh the two best actions: what you expect of each, and what could go wrong.
3. Choose one.

"""
    + ACTION_FORMAT,
    action_reminder=ACTION_FORMAT,
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
    + ACTION_FORMAT,
    try_again="""\
You are a reasoning agent in a grid world. You have attempted this board before, and that was wrong. Try again.

"""
    + ACTION_FORMAT,
)


def with_limit(prompts: PromptSet, max_steps: int) -> PromptSet:
    """Fills `{max_steps}` into the prompts."""

    def filled(text: str) -> str:
        return text.replace("{max_steps}", str(max_steps))

    return replace(
        prompts,
        solver=filled(prompts.solver),
        action_reminder=filled(prompts.action_reminder),
        retry=filled(prompts.retry),
        try_again=filled(prompts.try_again),
    )


# The few words that a very small model knows, each one token of the embedded model.
COMPACT_NO_EFFECT = "blocked"
COMPACT_PROMPTS = PromptSet(
    solver="play",
    action_reminder="play",
    reflection_system="explain",
    reflection="{trace}\n{feedback}\n{memory}",
    memory_empty="nothing",
    trace_turn="{observation}\n{action}\n",
    retry="{trace}\n{feedback}\nplay",
    try_again="wrong\nplay",
)
