"""What the loss of an objective is computed from, made of tensors instead of a model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mulligan.trainer.objective import ScoredTokens, Terms


def floats(count: int, low: float, high: float, seed: int) -> Tensor:
    return torch.empty(count, dtype=torch.float64).uniform_(low, high, generator=torch.Generator().manual_seed(seed))


def ragged(seed: int, count: int = 7) -> list[int]:
    """Numbers of trained tokens of so many data."""
    return [random.Random(seed + place).randint(1, 12) for place in range(count)]


def scored(counts: Sequence[int], log_probs_N: Tensor, reference_N: Tensor | None = None) -> ScoredTokens:
    counts_S = torch.tensor(counts)
    reference = log_probs_N.detach() if reference_N is None else reference_N
    return ScoredTokens(
        log_probs_N,
        torch.zeros_like(log_probs_N).detach(),
        torch.arange(len(counts)).repeat_interleave(counts_S),
        counts_S.to(log_probs_N.dtype),
        lambda: reference,
    )


def terms(
    counts: Sequence[int],
    log_probs_N: Tensor,
    *,
    numbers: Mapping[str, Tensor] | None = None,
    token_values: Mapping[str, Tensor | None] | None = None,
    others: Mapping[str, ScoredTokens] | None = None,
    reference_N: Tensor | None = None,
) -> Terms:
    """Token values that are None were left out."""
    own = scored(counts, log_probs_N, reference_N)
    absent_N = torch.full_like(log_probs_N, torch.nan).detach()
    values = {name: absent_N if value is None else value for name, value in (token_values or {}).items()}

    def compare(*arguments: object) -> Tensor:
        raise AssertionError("there are no distributions")

    return Terms(
        own.log_probs_N,
        own.entropy_N,
        own.rows_N,
        own.counts_S,
        own.reference,
        numbers=numbers or {},
        token_values=values,
        sequence=lambda name: (others or {})[name],
        compare=compare,
    )


def gradient(loss_N: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_N.sum(), inputs)
