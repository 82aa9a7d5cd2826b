"""From data to tensors: checks the data, and packs them into micro-batches of bounded size with little padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mulligan.common.errors import DomainError, invalid_field
from mulligan.trainer.data import Datum, ModelLimits, PolicyGradient, datum_problem


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Token sequences with one kind of objective that run in one pass.

    `check` validates the data of a call, `pack` groups data of similar length, and `microbatch` makes the tensors of a
    group. Shapes: _B sequences, _T tokens padded on the right, _N trained tokens, one sequence after another.

    There is no attention mask: in a causal model no token sees the padding on its right, and padding is not trained.
    Inputs end before the last trained token, because that one is only predicted.
    """

    rows: tuple[int, ...]  # index of each sequence in the caller's data
    counts: tuple[int, ...]  # trained tokens of each sequence
    input_ids_BT: Tensor
    positions_N: Tensor  # in the flattened _BT: where each trained token is predicted
    targets_N: Tensor  # ids of the trained tokens
    temperatures_N: Tensor
    weights_N: Tensor
    branches_N: Tensor  # index into the branches of the call
    signal_N: Tensor  # advantage, or target weight of a distilled datum
    rollout_log_probs_N: Tensor | None  # None: distilled
    old_log_probs_N: Tensor | None  # NaN where the present weights are the old policy


def check(data: Sequence[Datum], limits: ModelLimits) -> None:
    """Raises DomainError INVALID_FIELD, which names the first bad datum and its field."""
    objectives: dict[str, type] = {}
    for index, datum in enumerate(data):
        if found := datum_problem(datum, limits):
            raise _invalid(index, datum, found.field, found.expected, found.got)
        kind = type(datum.objective)
        if objectives.setdefault(datum.branch, kind) is not kind:
            raise _invalid(index, datum, "branch", "one kind of objective in each branch", repr(datum.branch))


def _invalid(index: int, datum: Datum, field: str, expected: str, got: str) -> DomainError:
    return invalid_field(f"data[{index}].{field}", f"{expected}; got {got} (datum_id {datum.datum_id[:100]!r})")


def length(datum: Datum) -> int:
    """The number of tokens that go into the model: those before the last trained one."""
    return len(datum.loss_mask) - 1 - datum.loss_mask[::-1].index(True)


def pack(data: Sequence[Datum], rows: Sequence[int], tokens: int) -> list[list[int]]:
    """Groups `rows` by similar length, longest first. A group has at most `tokens` tokens, padding included.

    A datum that is longer than `tokens` is a group of its own.
    """
    groups: list[list[int]] = []
    widest = 0
    for row in sorted(rows, key=lambda row: (-length(data[row]), row)):
        if not groups or (len(groups[-1]) + 1) * widest > tokens:
            groups.append([])
            widest = length(data[row])
        groups[-1].append(row)
    return groups


def microbatch(data: Sequence[Datum], rows: Sequence[int], branches: Sequence[str], device: torch.device) -> Microbatch:
    """The tensors of the data in `rows`, which must have one kind of objective."""
    width = max(length(data[row]) for row in rows)
    inputs: list[list[int]] = []
    positions: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    for place, row in enumerate(rows):
        datum = data[row]
        size = length(data[row])
        inputs.append([*datum.token_ids[:size], *([0] * (width - size))])
        trained = [index for index, is_trained in enumerate(datum.loss_mask) if is_trained]
        positions += [place * width + index - 1 for index in trained]
        targets += [datum.token_ids[index] for index in trained]
        counts.append(len(trained))
    repeats = torch.tensor(counts, device=device)

    def per_token(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device).repeat_interleave(repeats)

    def floats(values: Sequence[float] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float32, device=device)

    chosen = [data[row] for row in rows]
    rollout, old = _log_probs(chosen, counts)
    return Microbatch(
        rows=tuple(rows),
        counts=tuple(counts),
        input_ids_BT=torch.tensor(inputs, device=device),
        positions_N=torch.tensor(positions, device=device),
        targets_N=torch.tensor(targets, device=device),
        temperatures_N=per_token([datum.temperature for datum in chosen]),
        weights_N=per_token([datum.weight for datum in chosen]),
        branches_N=per_token([branches.index(datum.branch) for datum in chosen], torch.int64),
        signal_N=per_token([signal(datum) for datum in chosen]),
        rollout_log_probs_N=floats(rollout),
        old_log_probs_N=floats(old),
    )


def signal(datum: Datum) -> float:
    """The factor of a datum's loss besides its weight: advantage or target weight."""
    objective = datum.objective
    return objective.advantage if isinstance(objective, PolicyGradient) else objective.target_weight


def _log_probs(data: Sequence[Datum], counts: Sequence[int]) -> tuple[list[float] | None, list[float] | None]:
    rollout: list[float] = []
    old: list[float] = []
    for datum, count in zip(data, counts, strict=True):
        if not isinstance(datum.objective, PolicyGradient):
            return None, None
        rollout += datum.objective.rollout_log_probs
        old += datum.objective.old_log_probs or [math.nan] * count
    return rollout, old
