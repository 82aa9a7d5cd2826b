"""Sparse weights files: what they make of their base is the whole file, byte by byte, or they are refused."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mulligan.common.errors import DomainError, Reason
from mulligan.policy import sparse_weights
from mulligan.policy.sparse_weights import SparseFile, overwrite
from tests.support.effort import examples

SHARED = settings(
    max_examples=examples(100),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool)


def written(sparse: SparseFile | None, path: Path) -> Path:
    assert sparse is not None
    path.write_bytes(b"".join(sparse.pieces()))
    assert path.stat().st_size == sparse.size_bytes
    return path


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a file, and those of the next version. Few of them differ, so that a sparse file is smaller."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    before, after = {"rest": torch.zeros(4000)}, {"rest": torch.zeros(4000)}
    for name in draw(st.lists(st.sampled_from(["a", "a.values", "a.positions", "é", "layers.0"]), unique=True)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        before[name] = torch.randint(0, 2, shape).to(dtype)
        after[name] = before[name].clone()
        count = before[name].numel()
        for place in draw(st.lists(st.integers(0, count - 1), max_size=4) if count else st.just([])):
            after[name].view(-1)[place] = draw(st.sampled_from([0, 1, 7]))
    return before, after


@SHARED
@given(pairs(), st.sampled_from([1, 3, 2**24]))
def test_a_sparse_file_makes_the_whole_one_as_often_as_it_is_written(
    tmp_path: Path, pair: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]], at_once: int
) -> None:
    for name, tensors in zip(("base", "whole"), pair, strict=True):
        save_file(tensors, tmp_path / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_weights, "_AT_ONCE", at_once)
        sparse = written(SparseFile.between(tmp_path / "base", tmp_path / "whole"), tmp_path / "sparse")
        shutil.copyfile(tmp_path / "base", tmp_path / "made")
        for _ in range(2):
            overwrite(tmp_path / "made", sparse)
            assert (tmp_path / "made").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_format_is_the_one_of_the_contract(tmp_path: Path) -> None:
    """The library of the format reads it, so any language can write one."""
    before = {"w": torch.ones(2, 600, dtype=torch.bfloat16), "b": torch.zeros(3)}
    after = {"w": before["w"].clone(), "b": torch.zeros(3)}
    after["w"][1, 2] = 0.5
    after["w"][0, 1] = float("nan")
    after["w"][0, 3] = -2
    save_file(before, tmp_path / "base")
    save_file(after, tmp_path / "whole")
    found = load_file(written(SparseFile.between(tmp_path / "base", tmp_path / "whole"), tmp_path / "sparse"))
    assert sorted(found) == ["w.positions", "w.values"]
    assert found["w.positions"].dtype == torch.int32 and found["w.positions"].tolist() == [1, 3, 602]
    expected = torch.tensor([float("nan"), -2, 0.5], dtype=torch.bfloat16)
    assert found["w.values"].dtype == torch.bfloat16 and torch.equal(
        found["w.values"].view(torch.int16), expected.view(torch.int16)
    )


def test_bits_are_compared_not_numbers(tmp_path: Path) -> None:
    """0.0 and -0.0 are equal numbers, and a NaN differs from itself."""
    rest = torch.zeros(1000)
    save_file({"w": torch.tensor([0.0, float("nan")]), "x": rest}, tmp_path / "base")
    save_file({"w": torch.tensor([-0.0, float("nan")]), "x": rest}, tmp_path / "whole")
    sparse = SparseFile.between(tmp_path / "base", tmp_path / "whole")
    assert sparse is not None and {name: found.tolist() for name, found in sparse.changed.items()} == {"w": [0]}


@pytest.mark.parametrize(("changed", "smaller"), [(0, True), (300, True), (350, False), (1000, False)])
def test_there_is_none_that_is_no_smaller_than_the_whole_file(changed: int, smaller: bool, tmp_path: Path) -> None:
    """A value of bfloat16 has 2 bytes, its position has 4: a third of the values may change."""
    before = torch.zeros(1000, dtype=torch.bfloat16)
    after = before.clone()
    after[:changed] = 1
    save_file({"w": before}, tmp_path / "base")
    save_file({"w": after}, tmp_path / "whole")
    sparse = SparseFile.between(tmp_path / "base", tmp_path / "whole")
    assert (sparse is not None) is smaller
    assert sparse is None or sparse.size_bytes < (tmp_path / "whole").stat().st_size


def test_there_is_none_of_files_with_other_tensors_or_of_no_file(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    save_file({"w": torch.zeros(1000)}, whole)
    for number, tensors in enumerate(
        ({"v": torch.zeros(1000)}, {"w": torch.zeros(10, 100)}, {"w": torch.zeros(1000, dtype=torch.int32)}, {})
    ):
        save_file(tensors, tmp_path / f"{number}")
        assert SparseFile.between(tmp_path / f"{number}", whole) is None
        assert SparseFile.between(whole, tmp_path / f"{number}") is None
    (tmp_path / "damaged").write_bytes(whole.read_bytes()[:-1])
    for other in ("damaged", "none"):
        assert SparseFile.between(tmp_path / other, whole) is None
        assert SparseFile.between(whole, tmp_path / other) is None


I32 = torch.int32


@pytest.mark.parametrize(
    ("sparse", "words"),
    [
        (
            {"w.positions": torch.tensor([4], dtype=I32), "w.values": torch.ones(1)},
            "not ascending indices into 4 values",
        ),
        ({"w.positions": torch.tensor([-1]), "w.values": torch.ones(1)}, "not ascending indices into 4 values"),
        ({"w.positions": torch.tensor([1, 0]), "w.values": torch.ones(2)}, "not ascending"),
        ({"w.positions": torch.tensor([1, 1]), "w.values": torch.ones(2)}, "not ascending"),
        ({"w.positions": torch.tensor([0], dtype=I32)}, "as many positions as values"),
        ({"w.values": torch.ones(1)}, "as many positions as values"),
        ({"w.positions": torch.tensor([0, 1]), "w.values": torch.ones(1)}, "as many positions as values"),
        ({"w.positions": torch.tensor([[0]]), "w.values": torch.ones(1, 1)}, "as many positions as values"),
        ({"w.positions": torch.tensor(0), "w.values": torch.tensor(1.0)}, "as many positions as values"),
        ({"w.positions": torch.tensor([0.0]), "w.values": torch.ones(1)}, "is F32, not I32 or I64"),
        ({"w.positions": torch.tensor([0]), "w.values": torch.ones(1).bfloat16()}, "is F32, its new values are BF16"),
        ({"v.positions": torch.tensor([0]), "v.values": torch.ones(1)}, "v.positions is not"),
        ({"w": torch.ones(4)}, "w is not the positions or values"),
        ({"": torch.ones(4)}, "is not the positions or values"),
    ],
)
def test_what_does_not_fit_its_base_is_refused_by_name(
    sparse: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "whole")
    save_file(sparse, tmp_path / "sparse")
    with pytest.raises(DomainError, match=words) as caught:
        overwrite(tmp_path / "whole", tmp_path / "sparse")
    assert caught.value.reason is Reason.MODEL_MISMATCH
    assert load_file(tmp_path / "whole")["w"].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("count", [0, 1])
def test_values_of_a_size_that_is_not_theirs_are_refused(count: int, tmp_path: Path) -> None:
    """Of a type that its reader does not know, a header may tell any size."""
    header = b'{"w":{"dtype":"X9","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "whole").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    parts = {
        "w.positions": {"dtype": "I32", "shape": [count], "data_offsets": [0, 4 * count]},
        "w.values": {"dtype": "X9", "shape": [count], "data_offsets": [4 * count, 4 * count + 3]},
    }
    header = json.dumps(parts).encode()
    (tmp_path / "sparse").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * count + 3))
    with pytest.raises(DomainError, match="not of 1, 2, 4 or 8 bytes"):
        overwrite(tmp_path / "whole", tmp_path / "sparse")


@SHARED
@given(st.binary(max_size=200))
def test_any_bytes_are_written_or_refused(tmp_path: Path, content: bytes) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "whole")
    (tmp_path / "sparse").write_bytes(content)
    with suppress(DomainError):
        overwrite(tmp_path / "whole", tmp_path / "sparse")
    assert load_file(tmp_path / "whole")["w"].tolist() == [0, 0]
