"""Tasks that are numbered within their split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.env import numbered
from mulligan.env.base import Split, UnknownTask

COUNTS = {Split.TRAIN: numbered.MAX_TASKS, Split.TEST: 2}


def test_ids_are_those_of_a_page() -> None:
    assert numbered.ids(Split.TEST, 0, 10, COUNTS) == ["test/00000", "test/00001"]
    assert numbered.ids(Split.TRAIN, 41, 2, COUNTS) == ["train/00041", "train/00042"]
    assert numbered.ids(Split.TRAIN, numbered.MAX_TASKS - 1, 9, COUNTS) == ["train/99998"]
    for offset, limit in ((2, 1), (0, 0), (0, -1)):
        assert numbered.ids(Split.TEST, offset, limit, COUNTS) == []
    assert numbered.ids(Split.TEST, -5, 1, COUNTS) == ["test/00000"]


@given(st.sampled_from(Split), st.integers(0, numbered.MAX_TASKS - 1))
def test_an_id_is_read_as_it_was_written(split: Split, number: int) -> None:
    [task_id] = numbered.ids(split, number, 1, dict.fromkeys(Split, numbered.MAX_TASKS))
    assert numbered.read_id(task_id, dict.fromkeys(Split, numbered.MAX_TASKS), "lake") == (split, number)


@pytest.mark.parametrize(
    "task_id",
    ["", "train", "train/1", "train/99999", "test/00002", "dev/00000", "test/0000x", "test/0000²", "test//0000"],
)
def test_another_id_is_unknown(task_id: str) -> None:
    with pytest.raises(UnknownTask, match="is not a task of lake"):
        numbered.read_id(task_id, COUNTS, "lake")
