"""The data that a learner trains on, and the checks that it makes. Mirrors `Datum` of `mulligan.trainer.v1`.

Each objective is a type, whose fields are its inputs. A distilled datum is trained under another context than it was
sampled under, so the log-probabilities of its sampling must not reach the loss: `Distillation` has no field for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import compress
from typing import NamedTuple

from mulligan.trainer.objective import InputKind, Objective, Tokens, inputs, inputs_of
from mulligan.trainer.objectives import name_of
from mulligan.trainer.objectives.distillation import Distillation
from mulligan.trainer.objectives.policy_gradient import PolicyGradient

__all__ = ["Datum", "Distillation", "ModelLimits", "PolicyGradient", "Problem", "datum_problem", "token_count"]

_LARGEST_FLOAT32 = 3.4028234663852886e38
_LARGEST_INT32 = 2**31 - 1


# Objectives that have a message of their own in the contract. All others travel as `custom`.
TYPED = (PolicyGradient, Distillation)
# Where `custom` has the inputs of each kind.
PARTS = {InputKind.NUMBER: "numbers", InputKind.TOKEN_VALUES: "token_values", InputKind.TOKENS: "sequences"}


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
    objective: Objective
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
    UNUSABLE = "unusable"


class DatumProblem(NamedTuple):
    problem: Problem
    field: str
    expected: str
    got: str


def token_count(data: Iterable[Datum]) -> int:
    """Of their own sequences, for what is told of progress."""
    return sum(len(datum.token_ids) for datum in data)


def datum_problem(datum: Datum, limits: ModelLimits) -> DatumProblem | None:
    """The first problem for which a learner with these limits refuses the datum; None if it accepts it."""
    return (
        _refused_tokens(datum, limits, "")
        or _refused_numbers(datum)
        or _refused_token_values(datum)
        or _refused_sequences(datum, limits)
        or _refused_by_objective(datum)
    )


def input_field(objective: Objective, name: str) -> str:
    """The place of an input in the contract's Datum."""
    if isinstance(objective, TYPED):
        return f"{name_of(type(objective))}.{name}"
    part = next(PARTS[one.kind] for one in inputs(type(objective)) if one.name == name)
    return f'custom.{part}["{name}"]'


def _refused_tokens(datum: Datum | Tokens, limits: ModelLimits, prefix: str) -> DatumProblem | None:
    tokens = datum.token_ids
    mask = datum.loss_mask
    longest = limits.context_length or _LARGEST_INT32
    largest = limits.vocabulary_size - 1
    if not 2 <= len(tokens) <= longest:
        problem = Problem.TOO_SHORT if len(tokens) < 2 else Problem.TOO_LONG
        return DatumProblem(problem, f"{prefix}token_ids", f"2 to {longest} tokens", str(len(tokens)))
    if largest < 0:
        largest = _LARGEST_INT32
    if min(tokens) < 0 or max(tokens) > largest:
        place = next(i for i, token in enumerate(tokens) if not 0 <= token <= largest)
        field = f"{prefix}token_ids[{place}]"
        expected = f"a token id from 0 to {largest}"
        return DatumProblem(Problem.NOT_IN_VOCABULARY, field, expected, str(tokens[place]))
    field = f"{prefix}loss_mask"
    if len(mask) != len(tokens):
        return DatumProblem(Problem.MISALIGNED, field, f"one value per token, {len(tokens)}", str(len(mask)))
    if mask[0]:
        return DatumProblem(Problem.MISALIGNED, f"{field}[0]", "false: nothing predicts the first token", "true")
    if not any(mask):
        return DatumProblem(Problem.NOTHING_SAMPLED, field, "at least one trained token", "none")
    return None


def _refused_numbers(datum: Datum) -> DatumProblem | None:
    if not (math.isfinite(datum.temperature) and datum.temperature > 0):
        return DatumProblem(Problem.NOT_FINITE, "temperature", "a finite number above 0", str(datum.temperature))
    if not math.isfinite(datum.weight):
        return DatumProblem(Problem.NOT_FINITE, "weight", "a finite number", str(datum.weight))
    for name, value in inputs_of(datum.objective, InputKind.NUMBER).items():
        if not math.isfinite(value):
            field = input_field(datum.objective, name)
            return DatumProblem(Problem.NOT_FINITE, field, "a finite number", str(value))
    return None


def _refused_token_values(datum: Datum) -> DatumProblem | None:
    trained = sum(datum.loss_mask)
    for one in inputs(type(datum.objective)):
        if one.kind is InputKind.TOKEN_VALUES:
            values = getattr(datum.objective, one.name)
            field = input_field(datum.objective, one.name)
            if found := _refused_values(values, trained, field, required=one.required):
                return found
    return None


def _refused_values(values: tuple[float, ...], trained: int, field: str, *, required: bool) -> DatumProblem | None:
    if len(values) != trained and (values or required):
        return DatumProblem(Problem.MISALIGNED, field, f"one value per trained token, {trained}", str(len(values)))
    if not all(abs(value) <= _LARGEST_FLOAT32 for value in values):  # the learner's type for them
        return DatumProblem(Problem.NOT_FINITE, field, "finite numbers", "a non-finite one")
    return None


def _refused_sequences(datum: Datum, limits: ModelLimits) -> DatumProblem | None:
    for name, tokens in inputs_of(datum.objective, InputKind.TOKENS).items():
        field = input_field(datum.objective, name)
        found = _refused_tokens(tokens, limits, f"{field}.") or _refused_values(
            tokens.log_probs, sum(tokens.loss_mask), f"{field}.log_probs", required=False
        )
        if found:
            return found
    return None


def _refused_by_objective(datum: Datum) -> DatumProblem | None:
    trained_ids = tuple(compress(datum.token_ids, datum.loss_mask))
    unusable = datum.objective.unusable(trained_ids)
    if unusable is None:
        return None
    return DatumProblem(Problem.UNUSABLE, input_field(datum.objective, unusable.field), unusable.expected, unusable.got)
