"""Batches of token ids, with target distributions at some positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from mulligan.models.build import LETTERS, MOVES, ROLES, build_tokenizer
from mulligan.models.recipe.boards import ALPHABET, CELLS, SIDE, Bools, Floats, Ints

ABSENT = -1  # a slot that this row of the batch does not use


@dataclass(frozen=True)
class Vocabulary:
    ids: dict[str, int]

    def __getitem__(self, word: str) -> int:
        return self.ids[word]

    def many(self, words: tuple[str, ...] | str) -> Ints:
        return np.array([self.ids[word] for word in words])


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(build_tokenizer().get_vocab())


@dataclass(frozen=True)
class Batch:
    tokens: Ints  # (rows, length), padded on the right
    at: Ints  # (targets, 2): row and position; the target is about the next token
    targets: Floats  # (targets, vocabulary)
    weights: Floats  # (targets,)
    cells_at: Ints  # (cells, 2): row and position of board cells
    cell_classes: Ints  # (cells,): the class of each cell for the helper head


@dataclass
class Writer:
    """Collects columns of tokens for all rows. `batch` closes the gaps where a row has no token."""

    rows: int
    columns: list[Ints] = field(default_factory=list)
    _targets: list[tuple[int, Floats, Floats]] = field(default_factory=list)
    _own: list[tuple[int, Floats]] = field(default_factory=list)
    _cells: list[tuple[int, Ints]] = field(default_factory=list)

    def put(self, tokens: Ints | int, where: Bools | None = None) -> None:
        column = np.broadcast_to(np.asarray(tokens), (self.rows,))
        self.columns.append(column if where is None else np.where(where, column, ABSENT))

    def words(self, *words: str, where: Bools | None = None) -> None:
        for word in words:
            self.put(vocabulary()[word], where)

    def learn(self, targets: Floats, weights: Floats) -> None:
        """Sets the target distribution of the token after the last column."""
        self._targets.append((len(self.columns) - 1, targets, weights))

    def learn_column(self, weights: Floats) -> None:
        """Sets the last column's own tokens as targets, after whatever token stands before them."""
        self._own.append((len(self.columns) - 1, weights))

    def board(self, letters: Ints, where: Bools | None = None, classes: Ints | None = None) -> None:
        """Appends a board. `letters` (rows, 9) are token ids; `classes` are the cells' classes, negative for none."""
        for cell in range(CELLS):
            if cell and cell % SIDE == 0:
                self.words("\n", where=where)
            self.put(letters[:, cell], where)
            if classes is not None:
                self._cells.append((len(self.columns) - 1, classes[:, cell]))

    def legend(self, letters: Ints, where: Bools | None = None) -> None:
        """Appends a legend. `letters` (rows, 4) are indices of the alphabet."""
        symbols = letter_ids()
        for role, name in enumerate(ROLES):
            self.put(symbols[letters[:, role]], where)
            self.words(*((name, "\n") if role < 3 else (name,)), where=where)

    def batch(self) -> Batch:
        grid = np.stack(self.columns, axis=1)
        present = grid != ABSENT
        order = np.argsort(~present, axis=1, kind="stable")
        length = int(present.sum(axis=1).max())
        tokens = np.take_along_axis(grid, order, axis=1)[:, :length]
        places = np.cumsum(present, axis=1) - 1  # the new position of each column
        at = []
        targets = []
        weights = []
        for column, wanted, weight in self._targets:
            rows = np.flatnonzero((weight > 0) & present[:, column])
            at.append(np.stack([rows, places[rows, column]], axis=1))
            targets.append(wanted[rows])
            weights.append(weight[rows])
        for column, weight in self._own:
            rows = np.flatnonzero((weight > 0) & present[:, column])
            at.append(np.stack([rows, places[rows, column] - 1], axis=1))
            targets.append(np.eye(len(vocabulary().ids), dtype=np.float32)[grid[rows, column]])
            weights.append(weight[rows])
        cells_at = [np.zeros((0, 2), dtype=np.int64)]
        cell_classes = [np.zeros(0, dtype=np.int64)]
        for column, classes in self._cells:
            rows = np.flatnonzero(present[:, column] & (classes >= 0))
            cells_at.append(np.stack([rows, places[rows, column]], axis=1))
            cell_classes.append(classes[rows])
        return Batch(
            np.where(tokens == ABSENT, vocabulary()["<|pad|>"], tokens),
            np.concatenate(at),
            np.concatenate(targets),
            np.concatenate(weights),
            np.concatenate(cells_at),
            np.concatenate(cell_classes),
        )


@cache
def letter_ids() -> Ints:
    return vocabulary().many(LETTERS[:ALPHABET])


@cache
def effect_ids() -> Ints:
    """(2, 4): a move in a trace, with and without effect."""
    return vocabulary().many((*MOVES, *(f"{move} (no effect)" for move in MOVES))).reshape(2, 4)


@cache
def answer_ids() -> Ints:
    return vocabulary().many(tuple(f"```{move}```" for move in MOVES))
