"""Boards that people have: the tasks of a grid game, read from files instead of drawn.

`train_file` holds the training split and `test_file` the test split; a board that is in both is a test board alone.
With a `train_file` alone, one board in ten is a test board, by the same hash of its content as among drawn boards. A
task's id is a hash of its board: it stays the same wherever the board stands in which file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

from mulligan.env.base import Split, TaskInfo, UnknownTask
from mulligan.env.files import required
from mulligan.env.grid import GridBoard

MAX_STEPS = 1_000  # that a game whose boards come from files may allow


class FileBoard(GridBoard, Protocol):
    @property
    def rows(self) -> tuple[str, ...]: ...


B = TypeVar("B", bound=FileBoard)


class Placed(NamedTuple, Generic[B]):
    place: str  # file and line, for errors
    board: B
    least: int  # moves that it takes at least


class FileTasks(Generic[B]):
    """`train/HASH`, …, `test/HASH`, …, in the files' order, each board once. `files` are each split's, "" for none, and
    `limits` how many tasks it has at most.

    Raises ValueError that names the setting, or the file with the line and what was expected.
    """

    def __init__(
        self,
        name: str,
        files: Mapping[Split, str],
        limits: Mapping[Split, int],
        max_steps: int,
        read: Callable[[Path], Iterator[Placed[B]]],
    ) -> None:
        self._name = name
        self._tasks: dict[Split, dict[str, Placed[B]]] = {}
        for split, boards in _splits(files, limits, read).items():
            chosen = list(boards.values())[: limits[split]]
            _check_steps(files[split] or files[Split.TRAIN], chosen, max_steps)
            self._tasks[split] = {f"{split}/{_hash(placed.board)}": placed for placed in chosen}
        self.counts = {split: len(self._tasks[split]) for split in Split}

    def list(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        """With the moves that a board takes at least as difficulty."""
        first = max(offset, 0)
        chosen = list(self._tasks[split].items())[first : first + max(limit, 0)]
        return [TaskInfo(task_id, split, float(placed.least)) for task_id, placed in chosen]

    def board(self, task_id: str) -> B:
        """Raises UnknownTask."""
        for tasks in self._tasks.values():
            if task_id in tasks:
                return tasks[task_id].board
        raise UnknownTask(f"{task_id[:80]!r} is not a task of {self._name}")


def read_text(path: Path) -> str:
    """Raises ValueError. Titles of people may be in any encoding; boards are ASCII."""
    try:
        return path.read_text("utf-8-sig", errors="replace")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _splits(
    files: Mapping[Split, str], limits: Mapping[Split, int], read: Callable[[Path], Iterator[Placed[B]]]
) -> dict[Split, dict[B, Placed[B]]]:
    """Of the training file no more is read than is needed."""
    train: dict[B, Placed[B]] = {}
    test: dict[B, Placed[B]] = {}
    for placed in _boards("test_file", files[Split.TEST], read):
        test.setdefault(placed.board, placed)
    for placed in _boards("train_file", files[Split.TRAIN], read):
        if files[Split.TEST]:
            is_test = placed.board in test
            wanted = 0
        else:
            is_test = placed.board.is_test
            wanted = limits[Split.TEST]
        if not is_test:
            train.setdefault(placed.board, placed)
        elif len(test) < wanted:
            test.setdefault(placed.board, placed)
        if len(train) >= limits[Split.TRAIN] and len(test) >= wanted:
            break
    return {Split.TRAIN: train, Split.TEST: test}


def _boards(setting: str, path: str, read: Callable[[Path], Iterator[Placed[B]]]) -> Iterator[Placed[B]]:
    """Of all files that the path stands for."""
    for file in required(setting, path):
        any_here = False
        for placed in read(file):
            any_here = True
            yield placed
        if not any_here:
            raise ValueError(f"{file}: no board in it")


def _check_steps(path: str, chosen: Sequence[Placed[B]], max_steps: int) -> None:
    long = [placed for placed in chosen if placed.least > max_steps]
    if long:
        raise ValueError(
            f"{path}: {len(long)} of {len(chosen)} boards take more than max_steps = {max_steps} moves, as that of "
            f"{long[0].place}: at least {long[0].least}; max_steps must be at least "
            f"{max(placed.least for placed in long)} for these"
        )


def _hash(board: FileBoard) -> str:
    return hashlib.sha256("\n".join(board.rows).encode()).hexdigest()[:16]
