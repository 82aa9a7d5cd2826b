"""Tasks of a grid game from files of boards.

`train_file` holds the training split and `test_file` the test split; a board in both is a test board only. With
`train_file` alone, one board in ten is a test board, by the same hash as for drawn boards. A task's id is a hash of its
board, so it does not depend on the board's file or position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

from mulligan.env.base import Split, TaskInfo, UnknownTask
from mulligan.env.files import required
from mulligan.env.grid import GridBoard

MAX_STEPS = 1_000  # largest `max_steps` of a game with boards from files


class FileBoard(GridBoard, Protocol):
    @property
    def rows(self) -> tuple[str, ...]: ...


B = TypeVar("B", bound=FileBoard)


class Placed(NamedTuple, Generic[B]):
    place: str  # file and line, for errors
    board: B
    least: int  # lower bound of the moves to solve it


class FileTasks(Generic[B]):
    """The tasks `train/HASH`, …, `test/HASH`, …, in the order of the files, each board once. `files` has the path of
    each split, "" for none; `limits` has the largest number of tasks.

    Raises ValueError, which names the setting, or the file and line and what was expected.
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
        """Tasks of a split; the difficulty is a lower bound of the moves."""
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
    """Reads a file of boards. Raises ValueError. Boards are ASCII; titles may be in any encoding."""
    try:
        return path.read_text("utf-8-sig", errors="replace")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _splits(
    files: Mapping[Split, str], limits: Mapping[Split, int], read: Callable[[Path], Iterator[Placed[B]]]
) -> dict[Split, dict[B, Placed[B]]]:
    """Reads no more of the training file than needed."""
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
    """The boards of all files that match the path."""
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
