"""Over-turn masking: against Mini-o3's loss, Σ M_i A_i L_i / ΣM per group, on random losses L_i of samples."""

from __future__ import annotations

import random
from math import fsum

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mulligan.trainer.advantages import ADVANTAGES, Return
from mulligan.trainer.advantages.over_turn import Settings, estimate
from tests.support.returns import group, groups, per_token, sample


@given(groups(min_size=2), st.sampled_from(["grpo", "rloo", "turn_level"]), st.integers(0, 5))
def test_a_group_has_the_loss_of_the_paper(batch: list[list[Return]], base: str, seed: int) -> None:
    plugin = ADVANTAGES.find(base)
    unmasked = per_token(batch, plugin.estimate(batch, plugin.Settings()))
    masked = per_token(batch, estimate(batch, Settings(base=base)))
    noise = random.Random(seed)
    for items, plain, found in zip(batch, unmasked, masked, strict=True):
        losses = [[noise.gauss(0, 1) for _ in range(item.tokens)] for item in items]
        mask = torch.tensor([0.0 if item.truncated else 1.0 for item in items], dtype=torch.float64)
        sums = [_weighted(advantages, own) for advantages, own in zip(plain, losses, strict=True)]
        expected = float(mask @ torch.tensor(sums, dtype=torch.float64)) / max(float(mask.sum()), 1.0)
        ours = fsum(_weighted(advantages, own) for advantages, own in zip(found, losses, strict=True)) / len(items)
        assert ours == pytest.approx(expected, rel=1e-6, abs=1e-6)


def _weighted(advantages: list[float], losses: list[float]) -> float:
    return fsum(advantage * loss for advantage, loss in zip(advantages, losses, strict=True))


def test_a_truncated_failure_counts_in_the_mean_and_is_not_punished() -> None:
    cut = [sample(1.0), sample(0.0), sample(0.0, truncated=True), sample(0.0, truncated=True)]
    settings = Settings(base="dr_grpo")
    assert estimate([cut], settings) == [[1.5, -0.5, 0.0, 0.0]]
    assert estimate([[], cut[2:], [cut[0]]], settings) == [[], [0.0, 0.0], [0.0]]


def test_without_truncated_samples_it_is_its_base() -> None:
    batch = [group(1.0, 0.0, 0.0), group(0.5, 0.5)]
    for base in ("grpo", "lite_ppo", "reinforce_plus_plus"):
        plugin = ADVANTAGES.find(base)
        assert estimate(batch, Settings(base=base)) == plugin.estimate(batch, plugin.Settings())
