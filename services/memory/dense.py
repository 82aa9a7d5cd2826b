"""Exact search for the nearest embeddings: one matrix per scope, in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mulligan.memory.timeline import Timeline, best_first, grown, nth_greatest

_NONE = -1e30  # less than any product
_GREATEST = 1.001  # of a unit vector's numbers, rounding included
_ERROR = 1e-4  # more than the error of a product of unit vectors in float32


class DenseIndex:
    """The embeddings of a scope's texts: unit vectors of the same size, or zero. The matrix grows by doubling."""

    def __init__(self) -> None:
        self.texts = Timeline()
        self._rows: NDArray[np.float32] = np.zeros((0, 0), np.float32)

    @property
    def bytes(self) -> int:
        """About the memory that it takes."""
        return self.texts.bytes + self._rows.nbytes

    def add(
        self, text_id: int, position: int, environment: str, begins: int, ends: int | None, embedding: Sequence[float]
    ) -> None:
        """Raises ValueError for what is no such vector."""
        known = self._rows.shape[1] if self.texts.size else len(embedding)
        if len(embedding) != known or not np.abs(embedding).max(initial=0.0) <= _GREATEST:
            raise ValueError(f"it is no unit vector of {known} numbers")
        place = self.texts.add(text_id, position, environment, begins, ends)
        if place == 0:
            self._rows = np.zeros((0, len(embedding)), np.float32)
        if place == len(self._rows):
            self._rows = grown(self._rows, place)
        self._rows[place] = embedding

    def erase(self, position: int, version: int) -> None:
        """Nothing of the entry is left, and from this version on it is not there."""
        self._rows[self.texts.close_entry(position, version)] = 0.0

    def nearest(self, version: int, environment: str, embedding: Sequence[float], first: int) -> Iterator[list[int]]:
        """The positions of all entries of the version, in blocks, the greatest cosine first (`best_first`). Products in
        float32 choose the candidates. Their order is that of products in float64, each computed by itself, so it does
        not depend on where the rows lie."""
        visible = self.texts.visible(version, environment)
        begun = len(visible)
        query = np.asarray(embedding, np.float32)
        # `@` shares the work among threads of its own, which wait for each other: on busy cores for many milliseconds.
        rough = np.vecdot(self._rows[:begun], query) if begun else np.zeros(0, np.float32)
        rough[~visible] = -np.inf  # also what was returned already
        left = int(np.count_nonzero(visible))
        exact = query.astype(np.float64)
        size = max(first, 1)
        while left:
            least = nth_greatest(rough, size) - 2 * _ERROR if left > size else -np.inf
            near = np.flatnonzero(rough >= max(least, _NONE))
            scores = (self._rows[near].astype(np.float64) * exact).sum(axis=1)
            certain = scores >= least + _ERROR
            yield from best_first(scores, self.texts.positions[near], certain, len(near))
            rough[near[certain]] = -np.inf
            left -= int(np.count_nonzero(certain))
            size *= 4
