"""Credit per turn without a critic: GAE over turns, then over the tokens of each turn.

Turns k of a sample have rewards r_k. The value of turn k is the mean return from it on, over the samples of the group
that have a turn k; after a sample's last turn it is 0:

    G_k = Σ_{j ≥ k} Γ^(j-k) r_j     V_k = mean of the group's G_k
    A_k = r_k + Γ V_{k+1} - V_k + Γ Λ A_{k+1}

Within a turn of n tokens, each of value V_k, the reward of the last token is the turn's return A_k + V_k:

    a_n = A_k     a_t = (γ - 1) V_k + γ λ a_{t+1}

One number per sampled token. With `whiten` they are then normalised over all sampled tokens of the batch. With all four
factors at 1, a token's advantage is G_k - V_k of its turn. Before whitening, a turn that only one sample of the group
has gets 0 (at Γ = Λ = γ = 1).

Source: bi-level GAE of RAGEN and VAGEN (`compute_bi_level_gae_advantage_return`; RAGEN: arXiv 2504.20073), which takes
V from a critic and has one λ for both levels. GAE: arXiv 1506.02438.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, zip_longest

from pydantic import Field

from mulligan.common.plugins import PluginSettings
from mulligan.trainer.advantages import Advantage, Return
from mulligan.trainer.advantages._statistics import mean, whitened


class Settings(PluginSettings):
    """Γ and Λ over turns, γ and λ over the tokens of a turn: `turn_discount`, `turn_lambda`, `token_discount`,
    `token_lambda`, each from 0 to 1. `whiten` shifts and scales the result to mean 0 and standard deviation 1."""

    turn_discount: float = Field(1.0, ge=0, le=1)
    turn_lambda: float = Field(1.0, ge=0, le=1)
    token_discount: float = Field(1.0, ge=0, le=1)
    token_lambda: float = Field(1.0, ge=0, le=1)
    whiten: bool = True


def estimate(groups: Sequence[Sequence[Return]], settings: Settings) -> list[list[Advantage]]:
    per_sample: list[list[float]] = []
    for group in groups:
        values = _values(group, settings.turn_discount)
        per_sample.extend(list(_token_advantages(sample, values, settings)) for sample in group)
    if settings.whiten:
        flat = [value for sample in per_sample for value in sample]
        numbers = iter(whitened(flat, [1] * len(flat)))
        per_sample = [[next(numbers) for _ in sample] for sample in per_sample]
    samples = iter(per_sample)
    return [[tuple(next(samples)) for _ in group] for group in groups]


def _values(group: Sequence[Return], discount: float) -> list[float]:
    """V_k for each turn k that a sample of the group has."""
    returns = [_backwards(sample.turn_rewards, discount) for sample in group]
    at_turn = [[value for value in turn if value is not None] for turn in zip_longest(*returns)]
    return [mean(found) for found in at_turn]


def _token_advantages(sample: Return, values: Sequence[float], settings: Settings) -> Iterator[float]:
    turns = len(sample.turn_rewards)
    now = values[:turns]
    after = [*now, 0.0][1:]
    deltas = [
        reward + settings.turn_discount * later - value
        for reward, value, later in zip(sample.turn_rewards, now, after, strict=True)
    ]
    advantages = _backwards(deltas, settings.turn_discount * settings.turn_lambda)
    for advantage, value, tokens in zip(advantages, now, sample.turn_tokens, strict=True):
        inner = [(settings.token_discount - 1) * value] * (tokens - 1)
        yield from _backwards([*inner, advantage][:tokens], settings.token_discount * settings.token_lambda)


def _backwards(terms: Sequence[float], factor: float) -> list[float]:
    """x_k = terms[k] + factor · x_{k+1}."""
    return list(accumulate(reversed(terms), lambda later, term: term + factor * later))[::-1]
