"""Each common term of losses against numbers computed by hand, and what must hold for all inputs.

`tests/reference/test_trl.py` compares them with TRL.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mulligan.trainer.loss_terms import KlEstimator, MismatchCorrection, kl_estimate, mismatch_weights
from tests.support.terms import floats, gradient, terms

LOG_PROBS = st.floats(-100, 0, width=32)


def tensor(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, requires_grad=grad)


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        (MismatchCorrection.NONE, [1.0, 1.0, 1.0, 1.0]),
        (MismatchCorrection.TRUNCATED, [1.0, 1.5, 2.0, 0.25]),
        (MismatchCorrection.MASKED, [1.0, 1.5, 0.0, 0.0]),
        (MismatchCorrection.SEQUENCE_MASKED, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_mismatch_weights(correction: MismatchCorrection, weights: list[float]) -> None:
    ratios = tensor(1.0, 1.5, 4.0, 0.25)
    found = mismatch_weights(ratios.log() - 3.0, tensor(-3.0, -3.0, -3.0, -3.0), correction, 2.0)
    assert found.tolist() == pytest.approx(weights)


@given(LOG_PROBS, LOG_PROBS, st.floats(1.5, 10), st.sampled_from(MismatchCorrection))
def test_mismatch_weights_never_exceed_the_limit(
    old: float, rollout: float, limit: float, correction: MismatchCorrection
) -> None:
    log_probs = tensor(old, grad=True)
    weight = mismatch_weights(log_probs, tensor(rollout), correction, limit)
    assert 0 <= weight.item() <= limit * (1 + 1e-6)
    assert not weight.requires_grad


def test_kl_estimate() -> None:
    """r − log r − 1 at r = 1/2: −0.5 + log 2."""
    log_probs = tensor(-1.0, grad=True)
    kl = kl_estimate(log_probs, tensor(-1.0 - math.log(2)))
    kl.sum().backward()
    assert kl.item() == pytest.approx(math.log(2) - 0.5)
    assert log_probs.grad is not None
    assert log_probs.grad.item() == pytest.approx(0.5)  # 1 − r: back towards the reference
    assert kl_estimate(tensor(-2.0), tensor(-2.0)).item() == 0.0


@given(LOG_PROBS, LOG_PROBS)
def test_kl_estimate_is_never_negative(new: float, reference: float) -> None:
    value = kl_estimate(tensor(new), tensor(reference)).item()
    assert math.isfinite(value) and value >= 0


def test_kl_estimate_is_unbiased() -> None:
    """Its mean over tokens drawn from π is the divergence itself."""
    policy = torch.tensor([0.5, 0.3, 0.2])
    reference = torch.tensor([0.2, 0.3, 0.5])
    expected = (policy * (policy / reference).log()).sum()
    assert torch.allclose((policy * kl_estimate(policy.log(), reference.log())).sum(), expected)


@pytest.mark.parametrize(
    ("ratios", "weights"),
    [
        ([4.0, 1.0, 0.25, 3.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]),  # geometric means 1 and √3
        ([4.0, 4.0, 1.0, 0.9, 0.9], [0.0, 0.0, 0.0, 1.0, 1.0]),  # ∛16 is above 2
        ([1.0, 1.0, 1.0, 0.5, 0.4], [1.0, 1.0, 1.0, 0.0, 0.0]),  # √0.2 is below 1/2
    ],
)
def test_whole_sequences_are_masked(ratios: list[float], weights: list[float]) -> None:
    sequences = terms([3, 2], tensor(*ratios))
    found = mismatch_weights(
        tensor(*ratios).log() - 3.0,
        torch.full((5,), -3.0),
        MismatchCorrection.SEQUENCE_MASKED,
        2.0,
        lambda values_N: sequences.per_token(sequences.means(values_N)),
    )
    assert found.tolist() == weights


@pytest.mark.parametrize(("estimator", "value"), [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2)])
def test_other_kl_estimates(estimator: str, value: float) -> None:
    """At r = 1/2."""
    found = kl_estimate(tensor(-1.0), tensor(-1.0 - math.log(2)), KlEstimator(estimator))
    assert found.item() == pytest.approx(value)


def test_k2_has_the_gradient_of_the_divergence_and_k1_none() -> None:
    """On average over the tokens of the policy, as losses."""
    logits = tensor(0.3, -0.2, 0.5, grad=True)
    reference = torch.tensor([0.2, 0.3, 0.5]).log()
    policy = logits.log_softmax(-1)
    [expected] = gradient(policy.exp() * (policy - reference), logits)
    chances = policy.exp().detach()
    [second] = gradient(chances * kl_estimate(logits.log_softmax(-1), reference, KlEstimator.K2), logits)
    [first] = gradient(chances * kl_estimate(logits.log_softmax(-1), reference, KlEstimator.K1), logits)
    assert torch.allclose(second, expected, atol=1e-6) and torch.allclose(first, torch.zeros(3), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_kl_estimates_are_the_formulas_of_verl(seed: int) -> None:
    """The formulas of verl.trainer.ppo.core_algos.kl_penalty: "kl", "mse" and "low_var_kl"."""
    new = floats(40, -4, 0, seed).requires_grad_()
    reference = new.detach() + floats(40, -2, 2, seed + 1)
    expected = {
        KlEstimator.K1: new - reference,
        KlEstimator.K2: 0.5 * (new - reference) ** 2,
        KlEstimator.K3: torch.exp(reference - new) - (reference - new) - 1,
    }
    for estimator, values in expected.items():
        found = kl_estimate(new, reference, estimator)
        assert torch.allclose(found, values, atol=1e-6)
        assert torch.allclose(gradient(found, new)[0], gradient(values, new)[0], atol=1e-6)
