"""What the check of an engine's weights compares."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import CanaryProbe, Feature, ReplicaInfo, WeightsKind
from mulligan.policy.backend import ModelInfo, Scored, WeightsFile
from mulligan.policy.huggingface.compare import alike, alike_original
from mulligan.policy.preflight import check_probes
from mulligan.policy.version_table import VersionRecord
from mulligan.policy.weight_check import WeightCheck, largest_difference, tolerance_of
from tests.support.version_records import record_of

PROBE = CanaryProbe((1, 2, 3), (-0.5, -1.0))
MODEL = ModelInfo("m", "f", 8, 16, (), False, False, "float32", frozenset(Feature))


@pytest.mark.parametrize(
    ("setting", "dtype", "expected"),
    [(0.0, "float32", 1e-3), (0.0, "bfloat16", 0.25), (0.0, "", 0.25), (0.02, "float32", 0.02)],
)
def test_the_tolerance_follows_the_arithmetic(setting: float, dtype: str, expected: float) -> None:
    assert tolerance_of(setting, dtype) == expected


@pytest.mark.parametrize(
    ("probe", "field"),
    [
        (CanaryProbe((1,), ()), "canary[1].token_ids"),
        (CanaryProbe((1,) * 9, (-1.0,) * 8), "canary[1].token_ids"),
        (CanaryProbe((1, 16), (-1.0,)), "canary[1].token_ids"),
        (CanaryProbe((1, -1), (-1.0,)), "canary[1].token_ids"),
        (CanaryProbe((1, 2), (-1.0, -1.0)), "canary[1].log_probs"),
        (CanaryProbe((1, 2), (math.nan,)), "canary[1].log_probs"),
        (CanaryProbe((1, 2), (-math.inf,)), "canary[1].log_probs"),
    ],
)
def test_probes_that_no_engine_could_score_are_refused(probe: CanaryProbe, field: str) -> None:
    check_probes([PROBE], MODEL)
    with pytest.raises(DomainError) as caught:
        check_probes([PROBE, probe], MODEL)
    assert caught.value.reason is Reason.INVALID_FIELD and caught.value.metadata["field"] == field


def test_an_engine_that_cannot_score_gets_no_probes() -> None:
    blind = replace(MODEL, features=frozenset({Feature.FULL_WEIGHTS}))
    check_probes([], blind)
    with pytest.raises(DomainError) as caught:
        check_probes([PROBE], blind)
    assert caught.value.reason is Reason.UNSUPPORTED_OPTION
    assert caught.value.metadata == {"field": "canary", "feature": "score"}


_LOG_PROBS = st.lists(st.lists(st.floats(-30, 0), min_size=1, max_size=5), min_size=1, max_size=4)


@given(_LOG_PROBS, st.data())
def test_the_difference_is_the_greatest_one(rows: list[list[float]], data: st.DataObject) -> None:
    probes = [CanaryProbe(tuple(range(len(row) + 1)), tuple(row)) for row in rows]
    assert largest_difference(probes, rows) == 0
    row = data.draw(st.integers(0, len(rows) - 1))
    place = data.draw(st.integers(0, len(rows[row]) - 1))
    changed = [list(each) for each in rows]
    changed[row][place] += 0.75
    assert largest_difference(probes, changed) == pytest.approx(0.75)
    changed[row][place] = math.nan
    assert math.isnan(largest_difference(probes, changed))
    changed[row].pop()
    assert largest_difference(probes, changed) == math.inf
    assert largest_difference(probes, rows[1:]) == math.inf


@dataclass
class Engine:
    """A `Replica` that answers this."""

    log_probs: Sequence[float] = PROBE.log_probs
    found: str = "new"

    @property
    def info(self) -> ReplicaInfo:
        return ReplicaInfo("http://engine:1", True)

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float) -> Scored:
        assert temperature == 1.0 and list(sequences) == [PROBE.token_ids]
        return Scored((tuple(self.log_probs),), 0)

    async def checksum(self) -> str:
        return self.found


def trial(
    *, expected: str = "", others: dict[str, VersionRecord] | None = None, same: bool = False, path: Path = Path("w")
) -> WeightCheck:
    async def found_alike(_: WeightsFile, other: VersionRecord) -> bool:
        return same

    weights = WeightsFile(path, WeightsKind.FULL, 7, "s", (PROBE,))
    return WeightCheck(weights, 1e-3, "float32", expected, others or {}, found_alike)


async def fails(check: Awaitable[None]) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await check
    assert caught.value.reason is Reason.CANARY_FAILED
    return caught.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
async def test_weights_of_another_dtype_are_named_as_the_likely_cause(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, dtype=dtype)}, tmp_path / "w")
    check = trial(path=tmp_path / "w")
    error = await fails(check.admit(Engine((-0.5, -1.01))))
    name = str(dtype).removeprefix("torch.")
    expected = f" (the dtypes differ: the weights are {name}, the engine computes in float32)"
    assert error.message.endswith("0.001" if dtype is torch.float32 else f"0.001{expected}")


async def test_every_engine_is_compared_and_the_worst_is_told() -> None:
    check = trial()
    await check.admit(Engine((-0.5, -1.0002)))
    await check.admit(Engine((-0.5004, -1.0)))
    assert check.difference == pytest.approx(4e-4) and check.checksum == "new"
    error = await fails(check.admit(Engine((-0.5, -1.01))))
    assert error.metadata["tolerance"] == "0.001" and float(error.metadata["difference"]) == pytest.approx(0.01)
    assert "http://engine:1" in error.message and "version 7" in error.message
    assert (await fails(check.admit(Engine((-0.5, math.nan))))).metadata["difference"] == "nan"


async def test_engines_must_agree_on_the_checksum() -> None:
    check = trial()
    await check.admit(Engine())
    assert (await fails(check.admit(Engine(found="another")))).metadata == {"checksum": "another"}


async def test_the_checksum_of_other_weights_is_an_update_that_did_not_happen() -> None:
    others = {"old": record_of(3, 0, b"three")}
    await trial(others=others).admit(Engine(found="new"))
    error = await fails(trial(others=others).admit(Engine(found="old")))
    assert "that is version 3" in error.message and error.metadata == {"checksum": "old"}
    await trial(others=others, same=True).admit(Engine(found="old"))  # the same numbers in another file


async def test_the_checksum_of_the_same_weights_is_known() -> None:
    await trial(expected="before").admit(Engine(found="before"))
    await fails(trial(expected="before").admit(Engine(found="new")))


async def test_an_engine_without_checksums_is_compared_by_log_probabilities_alone() -> None:
    check = trial(expected="before")
    await check.admit(Engine(found=""))
    assert check.checksum == ""


def weights_file(path: Path, tensors: dict[str, torch.Tensor], kind: WeightsKind = WeightsKind.FULL) -> WeightsFile:
    folder = path
    if kind is WeightsKind.LORA:
        path.mkdir()
        (path / "adapter_config.json").write_text('{"r": 2}')
        path /= "adapter_model.safetensors"
    save_file(tensors, path)
    return WeightsFile(folder, kind, 1, "")


def test_files_are_alike_when_the_engine_cannot_tell_them_apart(tmp_path: Path) -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    step = {**one, "b": torch.tensor([3.0 + 1e-5])}
    first = weights_file(tmp_path / "1", one)
    same = weights_file(tmp_path / "2", {**one, "tied": one["a"].clone()})
    small = weights_file(tmp_path / "3", step)
    other = weights_file(tmp_path / "4", {"c": torch.tensor([1.0])})
    assert alike(first, same, "float32")
    assert not alike(first, small, "float32") and alike(first, small, "bfloat16")
    assert not alike(first, other, "float32")
    model = tmp_path / "model"
    model.mkdir()
    assert alike_original(first, str(model), "float32")  # nothing to compare with
    save_file({"a": one["a"]}, model / "model-00001-of-00002.safetensors")
    save_file({"b": one["b"]}, model / "model-00002-of-00002.safetensors")
    assert alike_original(first, str(model), "float32") and not alike_original(small, str(model), "float32")


def test_adapters_are_alike_with_equal_tensors_and_settings(tmp_path: Path) -> None:
    down = "base_model.model.x.lora_A.weight"
    up = "base_model.model.x.lora_B.weight"
    idle = {down: torch.ones(2, 2), up: torch.zeros(2, 2)}
    first, second = (weights_file(tmp_path / name, idle, WeightsKind.LORA) for name in "ab")
    assert alike(first, second, "float32") and alike_original(first, "m", "float32")
    assert second.path is not None
    (second.path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    assert not alike(first, second, "float32")
    busy = weights_file(tmp_path / "c", {down: torch.ones(2, 2), up: torch.ones(2, 2)}, WeightsKind.LORA)
    assert not alike_original(busy, "m", "float32") and not alike(first, busy, "float32")
