"""Preference against the formulas of TRL and LLaMA-Factory, on sequences of different lengths."""

from __future__ import annotations

import pytest
import torch

from mulligan.trainer.losses import ppo
from mulligan.trainer.objective import Tokens
from mulligan.trainer.objectives.preference import Preference, loss
from tests.support.terms import floats, gradient, ragged, scored, terms


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_that_of_trl(seed: int, given: bool) -> None:
    """trl.DPOTrainer.dpo_loss with loss_type="sigmoid"; the supervised term as in LLaMA-Factory's
    CustomDPOTrainer.get_batch_loss_metrics (`pref_ftx`)."""
    chosen_counts, rejected_counts = ragged(seed), ragged(seed + 50)
    chosen = floats(sum(chosen_counts), -4, 0, seed).requires_grad_()
    rejected = floats(sum(rejected_counts), -4, 0, seed + 1).requires_grad_()
    chosen_reference = floats(sum(chosen_counts), -4, 0, seed + 2)
    rejected_reference = floats(sum(rejected_counts), -4, 0, seed + 3)
    beta = floats(len(chosen_counts), 0.05, 0.5, seed + 4)
    ftx = floats(len(chosen_counts), 0, 1, seed + 5)

    other = scored(rejected_counts, rejected, rejected_reference)
    if given:  # then the learner's own reference is not asked for
        other = scored(rejected_counts, rejected, torch.full_like(rejected, torch.nan))
        object.__setattr__(other, "given_N", rejected_reference)
    found = loss(
        terms(
            chosen_counts,
            chosen,
            numbers={"beta": beta, "ftx": ftx},
            token_values={"reference_log_probs": chosen_reference if given else None},
            others={"rejected": other},
            reference_N=torch.full_like(chosen, torch.nan) if given else chosen_reference,
        ),
        ppo.Settings(),
    )

    def sums(values: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return torch.stack([part.sum() for part in values.split(counts)])

    chosen_logratios = sums(chosen, chosen_counts) - sums(chosen_reference, chosen_counts)
    rejected_logratios = sums(rejected, rejected_counts) - sums(rejected_reference, rejected_counts)
    logits = chosen_logratios - rejected_logratios
    policy_chosen_logps_avg = sums(chosen, chosen_counts) / torch.tensor(chosen_counts)
    expected = -torch.nn.functional.logsigmoid(beta * logits) + ftx * -policy_chosen_logps_avg
    assert torch.allclose(sums(found.loss_N, chosen_counts), expected, atol=1e-6)
    for one, other_one in zip(
        gradient(found.loss_N, chosen, rejected), gradient(expected, chosen, rejected), strict=True
    ):
        assert torch.allclose(one, other_one, atol=1e-6)
    assert sums(found.metrics["accuracy"].double(), chosen_counts).bool().tolist() == (logits > 0).tolist()


@pytest.mark.parametrize(("field", "beta", "ftx"), [("beta", 0.0, 0.0), ("ftx", 0.1, -1.0)])
def test_numbers_of_no_use_are_refused(field: str, beta: float, ftx: float) -> None:
    unusable = Preference(Tokens((2, 3), (False, True)), beta, ftx).unusable((3,))
    assert unusable is not None and unusable.field == field
