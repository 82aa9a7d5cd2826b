"""Transfer: each of its forms, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mulligan.trainer.losses import ppo
from mulligan.trainer.objectives.transfer import Transfer, loss
from tests.support.terms import floats, gradient, ragged, terms


def test_each_form_in_one_batch() -> None:
    """log p, p/(p + γ) and p/p_old, each with its derivative by log p: 1, γp/(p + γ)² and the ratio itself."""
    probs = [0.5, 0.01, 0.2]
    log_probs = torch.tensor([math.log(prob) for prob in probs], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([math.nan, math.nan, math.log(0.1)], dtype=torch.float64)
    advantages = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    shapes = torch.tensor([0.0, 0.1, 0.0], dtype=torch.float64)
    found = loss(
        terms(
            [1, 1, 1],
            log_probs,
            numbers={"advantage": advantages, "shape": shapes, "ratio": torch.tensor([0.0, 0.0, 1.0])},
            token_values={"old_log_probs": old, "advantages": None},
        ),
        ppo.Settings(),
    )
    assert found.loss_N.tolist() == pytest.approx([-math.log(0.5), -2 * 0.01 / 0.11, 2.0])
    derivatives = [-1.0, -2 * 0.1 * 0.01 / 0.11**2, 2.0]
    assert gradient(found.loss_N, log_probs)[0].tolist() == pytest.approx(derivatives)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_that_of_the_papers_on_sequences_of_different_lengths(seed: int) -> None:
    """ERL's −A·log π, Critique-GRPO's −A·π/(π + γ), and RuscaRL's clipped ratio with a KL term (the
    formulas of verl's compute_policy_loss and "low_var_kl"), in turn."""
    counts = ragged(seed)
    new = floats(sum(counts), -4, 0, seed).requires_grad_()
    old = new.detach() + floats(sum(counts), -2, 2, seed + 1)
    advantages = floats(len(counts), -2, 2, seed + 2)
    shapes = torch.tensor([0.1 * (place % 3 == 1) for place in range(len(counts))], dtype=torch.float64)
    ratios = torch.tensor([float(place % 3 == 2) for place in range(len(counts))], dtype=torch.float64)
    numbers = {"advantage": advantages, "shape": shapes, "ratio": ratios}
    reference = new.detach() + floats(sum(counts), -1, 1, seed + 3)
    values = {"old_log_probs": old, "advantages": None}
    made = terms(counts, new, numbers=numbers, token_values=values, reference_N=reference)
    found = loss(made, ppo.Settings(kl_coefficient=0.1, dual_clip=0))

    def clipped(advantage: Tensor, new: Tensor, old: Tensor, reference: Tensor) -> Tensor:
        ratio = (new - old).exp()
        kl = (reference - new).exp() - (reference - new) - 1
        return torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28)) + 0.1 * kl

    forms: list[Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = [
        lambda advantage, new, *_: -advantage * new,
        lambda advantage, new, *_: -advantage * new.exp() / (new.exp() + 0.1),
        clipped,
    ]
    parts = zip(advantages, new.split(counts), old.split(counts), reference.split(counts), strict=True)
    expected = torch.cat([forms[place % 3](*part) for place, part in enumerate(parts)])
    assert torch.allclose(found.loss_N, expected, atol=1e-6)
    assert torch.allclose(gradient(found.loss_N, new)[0], gradient(expected, new)[0], atol=1e-6)


@pytest.mark.parametrize("log_prob", [-200.0, 0.0])
def test_extreme_probabilities_have_finite_gradients(log_prob: float) -> None:
    log_probs = torch.tensor([log_prob] * 3, requires_grad=True)
    numbers = {name: torch.tensor(values) for name, values in NUMBERS.items()}
    found = loss(terms([1, 1, 1], log_probs, numbers=numbers, token_values=ABSENT), ppo.Settings())
    assert gradient(found.loss_N, log_probs)[0].isfinite().all()


NUMBERS = {"advantage": [1.0, 1.0, 1.0], "shape": [0.0, 0.1, 0.0], "ratio": [0.0, 0.0, 1.0]}
ABSENT = {"old_log_probs": None, "advantages": None}


def test_without_old_log_probs_the_present_weights_are_the_old_policy() -> None:
    """The ratio is 1 then, and its derivative by log p that of log p."""
    log_probs = torch.tensor([-0.5, -2.0], dtype=torch.float64, requires_grad=True)
    numbers = {"advantage": torch.tensor([3.0]), "shape": torch.tensor([0.0]), "ratio": torch.tensor([1.0])}
    found = loss(terms([2], log_probs, numbers=numbers, token_values=ABSENT), ppo.Settings())
    assert found.loss_N.tolist() == [-3.0, -3.0]
    assert gradient(found.loss_N, log_probs)[0].tolist() == [-3.0, -3.0]


def test_each_token_can_have_its_own_advantage() -> None:
    log_probs = torch.tensor([-0.5, -2.0, -1.0], dtype=torch.float64)
    numbers = {"advantage": torch.tensor([0.0, 3.0]), "shape": torch.zeros(2), "ratio": torch.zeros(2)}
    given = torch.tensor([2.0, -1.0, math.nan], dtype=torch.float64)
    values = {"old_log_probs": None, "advantages": given}
    assert loss(terms([2, 1], log_probs, numbers=numbers, token_values=values), ppo.Settings()).loss_N.tolist() == [
        1.0,
        -2.0,
        3.0,
    ]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (Transfer(1.0, 0.1, ratio=1.0), "shape"),
        (Transfer(1.0, -0.1), "shape"),
        (Transfer(1.0, ratio=0.5), "ratio"),
        (Transfer(1.0, 0.1, (-1.0,)), "old_log_probs"),
        (Transfer(1.0, advantages=(1.0,)), "advantage"),
    ],
)
def test_two_forms_at_once_are_refused(wrong: Transfer, field: str) -> None:
    unusable = wrong.unusable((3,))
    assert unusable is not None and unusable.field == field


def test_only_the_ratio_compares_with_the_old_policy() -> None:
    assert Transfer(1.0, 0.1).unusable((3,)) is None and Transfer(1.0, 0.0, (-1.0,), 1.0).unusable((3,)) is None
    assert Transfer(1.0, ratio=1.0).compares_with_old and not Transfer(1.0, 0.1).compares_with_old
    assert not Transfer(0.0).moves(ppo.Settings()) and Transfer(0.0, advantages=(0.0, 1.0)).moves(ppo.Settings())
    assert Transfer(0.0, ratio=1.0).moves(ppo.Settings()), "there is a KL term"
    assert not Transfer(0.0, ratio=1.0).moves(ppo.Settings(kl_coefficient=0.0))


def test_a_ratio_is_clipped_as_the_loss_says() -> None:
    """And there are its metrics."""
    log_probs = torch.tensor([0.0, 0.0], dtype=torch.float64, requires_grad=True)
    numbers = {"advantage": torch.tensor([1.0]), "shape": torch.zeros(1), "ratio": torch.ones(1)}
    values = {"old_log_probs": torch.tensor([-1.0, 0.0], dtype=torch.float64), "advantages": None}
    found = loss(terms([2], log_probs, numbers=numbers, token_values=values), ppo.Settings(kl_coefficient=0.0))
    assert found.loss_N.tolist() == [-1.28, -1.0] and found.metrics["clip_fraction"].tolist() == [True, False]
    assert gradient(found.loss_N, log_probs)[0].tolist() == [0.0, -1.0]
