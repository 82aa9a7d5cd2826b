"""PPO's loss against numbers computed by hand, and what must hold for all inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mulligan.trainer.losses.ppo import clipped_policy_gradient

LOG_PROBS = st.floats(-100, 0, width=32)


def tensor(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, requires_grad=grad)


def ppo(ratio: float, advantage: float, dual_clip: float = 3.0) -> tuple[float, float, bool]:
    """Loss, its derivative with respect to the log-probability, and whether it was clipped."""
    log_probs = tensor(math.log(ratio), grad=True)
    found, clipped = clipped_policy_gradient(
        log_probs, tensor(0.0), tensor(advantage), clip_low=0.2, clip_high=0.28, dual_clip=dual_clip
    )
    found.sum().backward()
    assert log_probs.grad is not None
    return found.item(), log_probs.grad.item(), bool(clipped.item())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.27, 1.0, -1.27, False),  # within the higher upper bound
        (1.5, 1.0, -1.28, True),
        (0.5, 1.0, -0.5, False),  # a good token that became rarer is pushed back without bound
        (0.9, -1.0, 0.9, False),
        (0.5, -1.0, 0.8, True),
        (2.0, -1.0, 2.0, False),
        (10.0, -1.0, 3.0, True),  # dual clip
        (5.0, 0.0, 0.0, False),
    ],
)
def test_clipped_policy_gradient(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    found, derivative, was_clipped = ppo(ratio, advantage)
    assert found == pytest.approx(loss) and was_clipped == clipped
    assert derivative == pytest.approx(0.0 if clipped else -advantage * ratio)


def test_dual_clip_can_be_switched_off() -> None:
    found, derivative, was_clipped = ppo(10.0, -1.0, dual_clip=0.0)
    assert found == pytest.approx(10.0) and derivative == pytest.approx(10.0) and not was_clipped


@given(LOG_PROBS, LOG_PROBS, st.floats(-10, 10, width=32))
def test_policy_gradient_is_bounded_below_and_finite(new: float, old: float, advantage: float) -> None:
    found, _ = clipped_policy_gradient(
        tensor(new), tensor(old), tensor(advantage), clip_low=0.2, clip_high=0.28, dual_clip=3.0
    )
    assert math.isfinite(found.item())
    lowest, highest = (-1.28 * advantage, 0.0) if advantage > 0 else (-0.8 * advantage, -3.0 * advantage)
    assert lowest - 1e-4 <= found.item() <= highest + 1e-4
