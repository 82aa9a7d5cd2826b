"""The data that a learner trains on, and the checks that it makes. Mirrors `Datum` of `mulligan.trainer.v1`.

The two objectives are two types. A distilled datum is trained under another context than it was sampled under, so the
log-probabilities of its sampling must not reach the loss: `Distillation` has no field for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

_LARGEST_FLOAT32 = 3.4028234663852886e38
_LARGEST_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """One value per trained token in each tuple. Without `old_log_probs`, the present weights are PPO's old policy."""

    advantage: float
    rollout_log_probs: tuple[float, ...]
    old_log_probs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Distillation:
    target_weight: float


@dataclass(frozen=True, slots=True)
class Datum:
    """One token sequence. Its loss is the sum over the trained tokens times `weight`; the first token is never trained.

    `temperature` is that of sampling (> 0): logits are divided by it before the softmax.
    """

    datum_id: str
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    weight: float
    temperature: float
    objective: PolicyGradient | Distillation
    branch: str


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Token ids are below `vocabulary_size`; a sequence has at most `context_length` tokens. 0 means unknown."""

    vocabulary_size: int
    context_length: int


class Problem(StrEnum):
    """The kind of a problem; also part of a metric's name (`dropped_…`)."""

    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    NOT_IN_VOCABULARY = "not_in_vocabulary"
    NOTHING_SAMPLED = "nothing_sampled"
    MISALIGNED = "misaligned"
    NOT_FINITE = "not_finite"


class DatumProblem(NamedTuple):
    problem: Problem
    field: str
    expected: str
    got: str


def datum_problem(datum: Datum, limits: ModelLimits) -> DatumProblem | None:
    """The first problem for which a learner with these limits refuses the datum; None if it accepts it."""
    return _refused_tokens(datum, limits) or _refused_numbers(datum)


def _refused_tokens(datum: Datum, limits: ModelLimits) -> DatumProblem | None:
    tokens = datum.token_ids
    mask = datum.loss_mask
    longest = limits.context_length or _LARGEST_INT32
    largest = limits.vocabulary_size - 1
    if not 2 <= len(tokens) <= longest:
        problem = Problem.TOO_SHORT if len(tokens) < 2 else Problem.TOO_LONG
        return DatumProblem(problem, "token_ids", f"2 to {longest} tokens", str(len(tokens)))
    if largest < 0:
        largest = _LARGEST_INT32
    if min(tokens) < 0 or max(tokens) > largest:
        place = next(i for i, token in enumerate(tokens) if not 0 <= token <= largest)
        field = f"token_ids[{place}]"
        expected = f"a token id from 0 to {largest}"
        return DatumProblem(Problem.NOT_IN_VOCABULARY, field, expected, str(tokens[place]))
    if len(mask) != len(tokens):
        return DatumProblem(Problem.MISALIGNED, "loss_mask", f"one value per token, {len(tokens)}", str(len(mask)))
    if mask[0]:
        return DatumProblem(Problem.MISALIGNED, "loss_mask[0]", "false: nothing predicts the first token", "true")
    if not any(mask):
        return DatumProblem(Problem.NOTHING_SAMPLED, "loss_mask", "at least one trained token", "none")
    return None


def _refused_numbers(datum: Datum) -> DatumProblem | None:
    objective = datum.objective
    if not (math.isfinite(datum.temperature) and datum.temperature > 0):
        return DatumProblem(Problem.NOT_FINITE, "temperature", "a finite number above 0", str(datum.temperature))
    single = {"weight": datum.weight}
    if not isinstance(objective, PolicyGradient):
        single["distillation.target_weight"] = objective.target_weight
    else:
        single["policy_gradient.advantage"] = objective.advantage
    for name, value in single.items():
        if not math.isfinite(value):
            return DatumProblem(Problem.NOT_FINITE, name, "a finite number", str(value))
    return _refused_log_probs(objective, sum(datum.loss_mask)) if isinstance(objective, PolicyGradient) else None


def _refused_log_probs(objective: PolicyGradient, trained: int) -> DatumProblem | None:
    for name, values, optional in (
        ("policy_gradient.rollout_log_probs", objective.rollout_log_probs, False),
        ("policy_gradient.old_log_probs", objective.old_log_probs, True),
    ):
        if len(values) != trained and (values or not optional):
            return DatumProblem(Problem.MISALIGNED, name, f"one value per trained token, {trained}", str(len(values)))
        if not all(abs(value) <= _LARGEST_FLOAT32 for value in values):  # the contract's type for them
            return DatumProblem(Problem.NOT_FINITE, name, "finite numbers", "a non-finite one")
    return None
