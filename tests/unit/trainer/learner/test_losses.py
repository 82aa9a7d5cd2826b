"""Each term of the loss against numbers computed by hand, and what must hold for all inputs."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mulligan.trainer.learner import losses
from mulligan.trainer.settings import MismatchCorrection

LOG_PROBS = st.floats(-100, 0, width=32)


def tensor(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, requires_grad=grad)


def ppo(ratio: float, advantage: float, dual_clip: float = 3.0) -> tuple[float, float, bool]:
    """Loss, its derivative with respect to the log-probability, and whether it was clipped."""
    log_probs = tensor(math.log(ratio), grad=True)
    loss, clipped = losses.clipped_policy_gradient(
        log_probs, tensor(0.0), tensor(advantage), clip_low=0.2, clip_high=0.28, dual_clip=dual_clip
    )
    loss.sum().backward()
    assert log_probs.grad is not None
    return loss.item(), log_probs.grad.item(), bool(clipped.item())


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
    loss, _ = losses.clipped_policy_gradient(
        tensor(new), tensor(old), tensor(advantage), clip_low=0.2, clip_high=0.28, dual_clip=3.0
    )
    assert math.isfinite(loss.item())
    lowest, highest = (-1.28 * advantage, 0.0) if advantage > 0 else (-0.8 * advantage, -3.0 * advantage)
    assert lowest - 1e-4 <= loss.item() <= highest + 1e-4


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        (MismatchCorrection.NONE, [1.0, 1.0, 1.0, 1.0]),
        (MismatchCorrection.TRUNCATED, [1.0, 1.5, 2.0, 0.25]),
        (MismatchCorrection.MASKED, [1.0, 1.5, 0.0, 0.0]),
    ],
)
def test_mismatch_weights(correction: MismatchCorrection, weights: list[float]) -> None:
    ratios = tensor(1.0, 1.5, 4.0, 0.25)
    found = losses.mismatch_weights(ratios.log() - 3.0, tensor(-3.0, -3.0, -3.0, -3.0), correction, 2.0)
    assert found.tolist() == pytest.approx(weights)


@given(LOG_PROBS, LOG_PROBS, st.floats(1.5, 10), st.sampled_from(MismatchCorrection))
def test_mismatch_weights_never_exceed_the_limit(
    old: float, rollout: float, limit: float, correction: MismatchCorrection
) -> None:
    log_probs = tensor(old, grad=True)
    weight = losses.mismatch_weights(log_probs, tensor(rollout), correction, limit)
    assert 0 <= weight.item() <= limit * (1 + 1e-6)
    assert not weight.requires_grad


def test_kl_estimate() -> None:
    """r − log r − 1 at r = 1/2: −0.5 + log 2."""
    log_probs = tensor(-1.0, grad=True)
    kl = losses.kl_estimate(log_probs, tensor(-1.0 - math.log(2)))
    kl.sum().backward()
    assert kl.item() == pytest.approx(math.log(2) - 0.5)
    assert log_probs.grad is not None
    assert log_probs.grad.item() == pytest.approx(0.5)  # 1 − r: back towards the reference
    assert losses.kl_estimate(tensor(-2.0), tensor(-2.0)).item() == 0.0


@given(LOG_PROBS, LOG_PROBS)
def test_kl_estimate_is_never_negative(new: float, reference: float) -> None:
    value = losses.kl_estimate(tensor(new), tensor(reference)).item()
    assert math.isfinite(value) and value >= 0


def test_kl_estimate_is_unbiased() -> None:
    """Its mean over tokens drawn from π is the divergence itself."""
    policy = torch.tensor([0.5, 0.3, 0.2])
    reference = torch.tensor([0.2, 0.3, 0.5])
    expected = (policy * (policy / reference).log()).sum()
    assert torch.allclose((policy * losses.kl_estimate(policy.log(), reference.log())).sum(), expected)


def test_distillation() -> None:
    log_probs = tensor(-2.0, -0.5, grad=True)
    loss = losses.distillation(log_probs, tensor(0.5, 2.0))
    loss.sum().backward()
    assert loss.tolist() == [1.0, 1.0]
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [-0.5, -2.0]


def test_distillation_has_no_room_for_importance_weights() -> None:
    assert list(inspect.signature(losses.distillation).parameters) == ["log_probs_N", "target_weights_N"]


@given(LOG_PROBS, LOG_PROBS, st.floats(0, 10, width=32))
def test_distillation_pulls_equally_wherever_the_probability_is(first: float, second: float, weight: float) -> None:
    """Its gradient is −w for every log-probability: nothing clips or reweighs it."""
    log_probs = tensor(first, second, grad=True)
    losses.distillation(log_probs, tensor(weight, weight)).sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [-weight, -weight]
