"""The common terms of policy gradients: all of them in one formula, to the bit, and each alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mulligan.trainer.loss_terms import KlEstimator, MismatchCorrection
from mulligan.trainer.losses import ppo, read_loss
from mulligan.trainer.objectives.policy_gradient import loss
from mulligan.trainer.settings import LossSettings
from tests.support.terms import floats, gradient, ragged, terms

SETTINGS = [
    ppo.Settings(),
    ppo.Settings(kl_coefficient=0.1, entropy_coefficient=0.01, dual_clip=0.0),
    ppo.Settings(mismatch_correction=MismatchCorrection.MASKED, clip_low=0.1, clip_high=0.1),
    ppo.Settings(mismatch_correction=MismatchCorrection.NONE, kl_coefficient=0.0),
]


def written_out(
    new: Tensor, old: Tensor, rollout: Tensor, reference: Tensor, advantages: Tensor, own: Mapping[str, Any]
) -> Tensor:
    """The loss of each token as one formula: PPO with dual clip, times the mismatch's weight, plus the k3 estimate."""

    def ratio(one: Tensor, other: Tensor) -> Tensor:
        return (one - other).clamp(-20, 20).exp()

    ratios = ratio(new, old)
    bounded = ratios.clamp(1 - own["clip_low"], 1 + own["clip_high"])
    clipped = torch.maximum(-advantages * ratios, -advantages * bounded)
    if own["dual_clip"]:
        ceiling = -advantages * own["dual_clip"]
        clipped = torch.where((advantages < 0) & (clipped > ceiling), ceiling, clipped)
    weights = ratio(old, rollout).detach()
    match own["mismatch_correction"]:
        case "none":
            weights = torch.ones_like(weights)
        case "truncated":
            weights = weights.clamp(max=2.0)
        case "masked":
            weights = torch.where((weights >= 1 / 2.0) & (weights <= 2.0), weights, 0.0)
    found: Tensor = weights * clipped - own["entropy_coefficient"] * torch.zeros_like(new)
    if own["kl_coefficient"] > 0:
        log_ratio = (reference - new).clamp(-20, 20)
        found = found + own["kl_coefficient"] * (torch.expm1(log_ratio) - log_ratio)
    return found


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_formula_to_the_bit(seed: int, settings: LossSettings) -> None:
    counts = ragged(seed)
    count = sum(counts)
    new = floats(count, -4, 0, seed).float().requires_grad_()
    old = new.detach() + floats(count, -1, 1, seed + 1).float()
    old[::3] = torch.nan  # there the present weights are the old policy
    rollout = new.detach() + floats(count, -1, 1, seed + 2).float()
    reference = new.detach() + floats(count, -1, 1, seed + 3).float()
    advantages = floats(len(counts), -2, 2, seed + 4).float()
    made = terms(
        counts,
        new,
        numbers={"advantage": advantages},
        token_values={"rollout_log_probs": rollout, "old_log_probs": old, "advantages": None},
        reference_N=reference,
    )
    found = loss(made, settings)
    each = advantages.repeat_interleave(torch.tensor(counts))
    filled = torch.where(old.isnan(), new.detach(), old)
    expected = written_out(new, filled, rollout, reference, each, settings.model_dump())
    assert torch.equal(found.loss_N, expected)
    assert torch.equal(gradient(found.loss_N, new)[0], gradient(expected, new)[0])
    assert set(found.metrics) == {"clip_fraction", "mismatch_kl"} | ({"kl"} if settings.kl_coefficient else set())


def simple(settings: LossSettings, *, rollout: list[float], advantages: list[float] | None = None) -> list[float]:
    """The losses of tokens with log-probability −1, of two sequences with two tokens each, the reference at −2."""
    log_probs = torch.full((4,), -1.0)
    made = terms(
        [2, 2],
        log_probs,
        numbers={"advantage": torch.tensor([1.0, 2.0])},
        token_values={
            "rollout_log_probs": torch.tensor(rollout),
            "old_log_probs": None,
            "advantages": None if advantages is None else torch.tensor(advantages),
        },
        reference_N=torch.full((4,), -2.0),
    )
    found: list[float] = loss(made, settings).loss_N.tolist()
    return found


PLAIN = ppo.Settings(kl_coefficient=0.0)


def test_advantages_of_tokens_take_the_place_of_the_datums() -> None:
    nan = float("nan")
    assert simple(PLAIN, rollout=[-1.0] * 4) == [-1.0, -1.0, -2.0, -2.0]
    assert simple(PLAIN, rollout=[-1.0] * 4, advantages=[0.5, -0.5, nan, nan]) == [-0.5, 0.5, -2.0, -2.0]


def test_a_sequence_whose_engine_was_far_off_is_left_out() -> None:
    settings = ppo.Settings(kl_coefficient=0.0, mismatch_correction=MismatchCorrection.SEQUENCE_MASKED)
    assert simple(settings, rollout=[-2.0, 0.0, -2.0, -2.0]) == [-1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize(("estimator", "kl"), [("k1", 1.0), ("k2", 0.5), ("k3", 0.36787944)])
def test_the_divergence_is_estimated_as_asked(estimator: str, kl: float) -> None:
    """At a ratio of 1/e."""
    settings = ppo.Settings(kl_coefficient=2.0, kl_estimator=KlEstimator(estimator))
    assert simple(settings, rollout=[-1.0] * 4)[0] == pytest.approx(-1.0 + 2.0 * kl)


@pytest.mark.parametrize("name", ["gspo", "cispo"])
def test_the_common_terms_belong_to_every_loss(name: str) -> None:
    found = simple(read_loss({"name": name, "kl_coefficient": 2.0}), rollout=[-1.0] * 4)
    without = simple(read_loss({"name": name, "kl_coefficient": 0.0}), rollout=[-1.0] * 4)
    assert [a - b for a, b in zip(found, without, strict=True)] == pytest.approx([2.0 * 0.36787944] * 4)
