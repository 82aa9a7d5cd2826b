"""AdamW with moments of 8 bits learns as AdamW does, from a quarter of the memory, and is resumed exactly."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.learner.learner import Learner
from tests.support.learning import PLAIN, distilled, server_settings, spec, weights_digest
from tests.support.tiny_model import write_square_model

LESSON = [
    distilled(f"{index}", [2 + index, *range(20 + index, 60 + index)], range(1, 41), weight=1 / 160)
    for index in range(4)
]


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All its matrices are of one shape, because a step is compiled for each shape."""
    return write_square_model(tmp_path_factory.mktemp("square"))


def make(model: Path, folder: Path, moments: Literal["float32", "8bit"] = "8bit") -> Learner:
    settings = spec(model, deterministic=True, learning_rate=1e-2)
    optimizer = settings.optimizer.model_copy(update={"moments": moments})
    return Learner("learner", replace(settings, optimizer=optimizer), server_settings(folder))


def learn(learner: Learner, steps: int) -> list[float]:
    """The mean negative log-probability before each step."""
    found = []
    for _ in range(steps):
        found.append(learner.forward_backward(LESSON, PLAIN)["distilled/loss"])
        learner.optim_step()
    return found


def state(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner._optimizer.stored().items()}


class TestEightBits:
    @pytest.fixture(autouse=True)
    def _extra(self) -> None:
        pytest.importorskip("torchao", reason="needs the extra adam8bit")

    @pytest.mark.long
    def test_it_learns_as_with_float32_moments_from_a_quarter_of_their_memory(
        self, square: Path, tmp_path: Path
    ) -> None:
        found: dict[str, list[float]] = {}
        sizes: dict[str, int] = {}
        for moments in ("float32", "8bit"):
            learner = make(square, tmp_path, moments)
            found[moments] = learn(learner, 16)
            sizes[moments] = sum(tensor.nbytes for name, tensor in state(learner).items() if "exp_avg" in name)
        first, last = found["float32"][0], found["float32"][-1]
        assert found["8bit"][0] == first and last < first / 4
        assert found["8bit"] == pytest.approx(found["float32"], abs=0.02 * first)
        assert found["8bit"] != found["float32"]
        assert sizes["8bit"] < 0.29 * sizes["float32"]

    def test_a_resumed_learner_goes_on_as_if_it_had_not_stopped(self, square: Path, tmp_path: Path) -> None:
        learner = make(square, tmp_path)
        learn(learner, 3)
        learner.save_checkpoint("three")
        saved = state(learner)
        learn(learner, 2)
        resumed = make(square, tmp_path)
        resumed.load_checkpoint("three")
        loaded = state(resumed)
        assert loaded.keys() == saved.keys() and any(name.endswith(".codes") for name in saved)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
        learn(resumed, 2)
        assert weights_digest(resumed) == weights_digest(learner)

    def test_a_checkpoint_with_other_moments_is_refused(self, square: Path, tmp_path: Path) -> None:
        make(square, tmp_path).save_checkpoint("eight")
        with pytest.raises(DomainError, match="it has moments of the kind 8bit") as caught:
            make(square, tmp_path, "float32").load_checkpoint("eight")
        assert caught.value.reason is Reason.CHECKPOINT_MISMATCH

    def test_it_is_refused_where_nothing_can_be_compiled(
        self, square: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no C++ compiler\nand more")

        monkeypatch.setattr(torch, "compile", broken)
        with pytest.raises(
            DomainError, match=r"8bit needs: torch.compile.*RuntimeError: no C\+\+ compiler\)$"
        ) as caught:
            make(square, tmp_path)
        assert caught.value.metadata["field"] == "optimizer.moments"


def test_without_the_extra_it_is_refused_by_name(square: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.delitem(sys.modules, "mulligan.trainer.learner.adam8bit", raising=False)
    monkeypatch.delattr("mulligan.trainer.learner.adam8bit", raising=False)
    with pytest.raises(DomainError, match="needs the extra 'adam8bit'") as caught:
        make(square, tmp_path)
    assert caught.value.reason is Reason.INVALID_FIELD and caught.value.metadata["field"] == "optimizer.moments"
