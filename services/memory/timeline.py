"""The texts of a scope in memory, each with the versions that had it, and the order in which a search returns them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

_TEXT_BYTES = 128  # of a text, besides the arrays
_NAME_BYTES = 400  # of an environment
_EMPTY_BYTES = 4096
_MASKS = 4  # that are kept: runs ask for the version that they began with
_SAMPLE = 4096
NEVER = np.iinfo(np.int64).max
Floats = NDArray[np.float64]
Places = NDArray[np.int64]
Mask = NDArray[np.bool_]
S = TypeVar("S", bound=np.generic)


class Timeline:
    """Texts in the order of the versions that began with them. A text's place is its number here, from 0. `version` is
    the version of the scope up to which texts were added, `closed` the one up to which they were closed."""

    def __init__(self) -> None:
        self.size = 0
        self.version = 0
        self.closed = 0
        self.positions: Places = np.zeros(0, np.int64)  # of the entries
        self._begins: Places = np.zeros(0, np.int64)
        self._ends: Places = np.zeros(0, np.int64)
        self._environments: Places = np.zeros(0, np.int64)
        self._numbers: dict[str, int] = {}  # of environments
        self._places: dict[int, int] = {}  # of texts, by their id
        self._edits = 0
        self._masks: OrderedDict[tuple[int, str, int], Mask] = OrderedDict()  # those that were asked for last

    @property
    def bytes(self) -> int:
        """About the memory that it takes."""
        arrays = (self.positions, self._begins, self._ends, self._environments)
        return (
            sum(array.nbytes for array in arrays)
            + self.size * _TEXT_BYTES
            + len(self._numbers) * _NAME_BYTES
            + sum(mask.nbytes for mask in self._masks.values())
            + _EMPTY_BYTES
        )

    def add(self, text_id: int, position: int, environment: str, begins: int, ends: int | None) -> int:
        """Returns the text's place."""
        place = self.size
        if place == len(self.positions):
            names = ("positions", "_begins", "_ends", "_environments")
            for name in names:
                setattr(self, name, grown(getattr(self, name), place))
        self.positions[place] = position
        self._begins[place] = begins
        self._ends[place] = NEVER if ends is None else ends
        self._environments[place] = self._numbers.setdefault(environment, len(self._numbers))
        self._places[text_id] = place
        self._edits += 1
        self.size += 1
        return place

    def close(self, text_id: int, version: int) -> None:
        """From this version on the text is not there any more."""
        if (place := self._places.get(text_id)) is not None:
            self._edits += 1
            self._ends[place] = version

    def close_entry(self, position: int, version: int) -> Places:
        """The same of all texts of an entry. Returns their places."""
        places = np.flatnonzero(self.positions[: self.size] == position)
        self._edits += 1
        self._ends[places] = np.minimum(self._ends[places], version)
        return places

    def begun(self, version: int) -> int:
        """How many texts had begun at this version: those at the first places."""
        return int(np.searchsorted(self._begins[: self.size], version, side="right"))

    def visible(self, version: int, environment: str) -> Mask:
        """(begun,) Which of these texts that version has. Not to be written to: a run asks for the same one again."""
        asked = (version, environment, self._edits)
        if asked not in self._masks:
            begun = self.begun(version)
            number = self._numbers.get(environment, -1)
            self._masks[asked] = (self._ends[:begun] > version) & (self._environments[:begun] == number)
            if len(self._masks) > _MASKS:
                self._masks.popitem(last=False)
        self._masks.move_to_end(asked)
        return self._masks[asked]


def grown(array: NDArray[S], size: int) -> NDArray[S]:
    """A copy with room for twice as many rows as `size`."""
    wider = np.zeros((max(2 * size, 64), *array.shape[1:]), array.dtype)
    wider[:size] = array[:size]
    return wider


def best_first(scores: Floats, positions: Places, found: Mask, first: int) -> Iterator[list[int]]:
    """The positions of what was found, in blocks: the greatest scores first, among equals the greatest position. The
    first block has `first` or more, each later one four times as many."""
    places = np.flatnonzero(found)
    size = max(first, 1)
    while len(places):
        own = scores[places]
        least = nth_greatest(own, size) if len(places) > size else -np.inf
        block = places[own >= least]
        order = np.lexsort((-positions[block], -scores[block]))
        yield [int(position) for position in positions[block[order]]]
        places = places[own < least]
        size *= 4


def nth_greatest(values: NDArray[np.floating[Any]], n: int) -> float:
    """With n = 1 the greatest of the values. Of many, a sample first shows which ones are too small."""
    if len(values) > 4 * _SAMPLE and n <= _SAMPLE // 4:
        sample = values[:: len(values) // _SAMPLE]
        values = values[values >= nth_greatest(sample, n)]
    return float(np.partition(values, len(values) - n)[len(values) - n])
