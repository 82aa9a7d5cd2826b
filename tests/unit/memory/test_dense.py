"""Search for the nearest embeddings, against all products in float64."""

from __future__ import annotations

import numpy as np

from mulligan.memory.dense import DenseIndex


def test_all_of_the_nearest_are_found_in_their_order() -> None:
    random = np.random.default_rng(3)
    vectors = random.normal(size=(3000, 24)).astype(np.float32)
    vectors[1000:1500] = vectors[0] + 1e-4 * vectors[1000:1500]  # closer to each other than float32 can tell
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = DenseIndex()
    for position, vector in enumerate(vectors):
        index.add(position, position, "lake", position + 1, None, list(vector))
    for query in (vectors[0], vectors[7]):
        for version in (1, 900, 1200, 3000):
            products = vectors[:version].astype(np.float64) @ query.astype(np.float64)
            blocks = list(index.nearest(version, "lake", list(query), 10))
            positions = [position for block in blocks for position in block]
            assert sorted(positions) == list(range(version)) and len(blocks[0]) >= min(10, version)
            assert np.all(np.diff(products[positions]) <= 1e-12)


def test_equal_ones_come_latest_first_wherever_their_rows_lie() -> None:
    """A product of matrices may round the last rows differently."""
    random = np.random.default_rng(4)
    vector = random.normal(size=37)
    vector /= np.linalg.norm(vector)
    for count in range(1, 40):
        index = DenseIndex()
        for position in range(count):
            index.add(position, position, "lake", position + 1, None, list(vector))
        blocks = index.nearest(count, "lake", list(random.normal(size=37)), 3)
        assert [position for block in blocks for position in block] == list(range(count))[::-1]


def test_nothing_is_found_where_nothing_is() -> None:
    index = DenseIndex()
    assert list(index.nearest(0, "lake", [1.0, 0.0], 3)) == []
    index.add(1, 1, "maze", 2, None, [0.0, 0.0])
    assert list(index.nearest(5, "lake", [1.0, 0.0], 3)) == [] == list(index.nearest(1, "maze", [1.0, 0.0], 3))
    assert list(index.nearest(2, "maze", [1.0, 0.0], 3)) == [[1]]
