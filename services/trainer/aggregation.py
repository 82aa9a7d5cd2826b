"""How the token losses of a branch are summed.

A datum's loss is its weight times the sum over its trained tokens. So every aggregation is a factor on weights, and the
learner needs to know none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from math import fsum, inf

from mulligan.trainer.data import Datum


class Aggregation(StrEnum):
    """What a token loss of sequence i is multiplied by, in a branch of N sequences that weighs 1. Sequence i has T_i
    trained tokens.

    SEQUENCE_MEAN_TOKEN_SUM: 1 / N (verl's `seq-mean-token-sum`, TRL's "luspo").
    SEQUENCE_MEAN_TOKEN_MEAN: 1 / (N · T_i) (GRPO, arXiv 2402.03300).
    TOKEN_MEAN: 1 / ΣT, over the whole batch of the branch (DAPO, arXiv 2503.14476).
    CONSTANT: 1 / (N · constant) (Dr. GRPO, arXiv 2503.20783, whose constant is the largest length).
    """

    SEQUENCE_MEAN_TOKEN_SUM = "sequence_mean_token_sum"
    SEQUENCE_MEAN_TOKEN_MEAN = "sequence_mean_token_mean"
    TOKEN_MEAN = "token_mean"
    CONSTANT = "constant"


def aggregate(data: Sequence[Datum], mode: Aggregation, constant: float = 1.0) -> list[Datum]:
    """The data of one branch, or of branches that are one loss, with their weights scaled. A sequence is a datum.

    SEQUENCE_MEAN_TOKEN_SUM returns the same objects. `constant` is for CONSTANT alone. Weights may differ: TOKEN_MEAN
    is then the mean over tokens by weight, times the branch's weight, so datum i gets w_i · Σw / Σ(w · T). Raises
    ValueError if `constant` is not a finite number above 0.
    """
    if mode is Aggregation.SEQUENCE_MEAN_TOKEN_SUM:
        return list(data)
    if mode is Aggregation.CONSTANT:
        if not 0 < constant < inf:
            raise ValueError(f"constant: expected a finite number above 0, got {constant}")
        return [replace(datum, weight=datum.weight / constant) for datum in data]
    tokens = [sum(datum.loss_mask) for datum in data]
    if mode is Aggregation.SEQUENCE_MEAN_TOKEN_MEAN:
        return [replace(datum, weight=datum.weight / max(count, 1)) for datum, count in zip(data, tokens, strict=True)]
    weight = fsum(datum.weight for datum in data)
    weighted_tokens = fsum(datum.weight * count for datum, count in zip(data, tokens, strict=True))
    factor = weight / weighted_tokens if weighted_tokens else 1.0
    return [replace(datum, weight=datum.weight * factor) for datum in data]
