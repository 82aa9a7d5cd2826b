"""Moments of 8 bits in two processes: what one process learns, and checkpoints that go from one number to the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support import ranked, ranked_moments
from tests.support.tiny_model import write_square_model


def optimizer_file(folder: Path, checkpoint: str) -> Path:
    (path,) = (folder / "checkpoints" / "learner" / checkpoint).glob("optimizer-*")
    return path


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Gradients are summed in another order, so a few moments have the next code."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-3), name


@pytest.mark.long
@pytest.mark.timeout(900)  # each process compiles its steps
def test_two_processes_learn_what_one_learns_and_their_checkpoints_are_the_same(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="needs the extra adam8bit")
    write_square_model(tmp_path / "square", vocabulary=65)  # rows that two processes cannot share evenly
    ranked.by_torchrun(ranked_moments.__name__, "learn", tmp_path)
    learner = ranked_moments.make(tmp_path)
    learned = ranked_moments.learn(learner)
    assert_close(load_file(tmp_path / "learn.safetensors"), learned)

    learner.save_checkpoint("of-one")
    of_one = load_file(optimizer_file(tmp_path, "of-one"))
    learner.load_checkpoint("of-two")
    learner.save_checkpoint("of-two-again")
    of_two = optimizer_file(tmp_path, "of-two")
    assert optimizer_file(tmp_path, "of-two-again").name == of_two.name, "its name is its checksum"
    uneven = {name for name in of_one if "embed" in name or "lm_head" in name}
    assert {name for name in of_one if name.endswith(".codes")} - uneven == {
        name for name in load_file(of_two) if name.endswith(".codes")
    }

    ranked.by_torchrun(ranked_moments.__name__, "reshard", tmp_path)
    again = load_file(optimizer_file(tmp_path, "of-one-again"))
    for name in of_one.keys() - uneven:
        assert torch.equal(again[name], of_one[name]), name
    assert again["model.embed_tokens.weight/exp_avg"].shape == (65, 64), "as numbers, where codes cannot be shared"
    learner.load_checkpoint("of-one")
    assert_close(load_file(tmp_path / "reshard.safetensors"), ranked_moments.learn(learner))
