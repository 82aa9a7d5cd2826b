"""From data to tensors: checks the data, and packs them into micro-batches of bounded size with little padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mulligan.common.errors import DomainError, invalid_field
from mulligan.trainer.data import Datum, ModelLimits, datum_problem
from mulligan.trainer.objective import InputKind, Tokens, inputs, inputs_of


@dataclass(frozen=True, slots=True)
class Sequences:
    """A token sequence of each datum of a micro-batch. Shapes: _S sequences, _T tokens padded on the right, _N trained
    tokens, one sequence after another.

    There is no attention mask: in a causal model no token sees the padding on its right, and padding is not trained.
    Inputs end before the last trained token, because that one is only predicted.
    """

    counts: tuple[int, ...]  # trained tokens of each sequence
    input_ids_ST: Tensor
    positions_N: Tensor  # in the flattened _ST: where each trained token is predicted
    targets_N: Tensor  # ids of the trained tokens
    temperatures_N: Tensor
    rows_N: Tensor  # index of each token's sequence
    given_N: Tensor  # log-probabilities that the caller gave; NaN without


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Data with one kind of objective that run in one pass.

    `check` validates the data of a call, `pack` groups data of similar length, and `microbatch` makes the tensors of a
    group. The inputs of the objective are there by name: numbers, one for each datum (_S); token values, one for each
    trained token (_N), NaN for data that left them out; further sequences.
    """

    rows: tuple[int, ...]  # index of each datum in the caller's data
    own: Sequences
    others: dict[str, Sequences]
    weights_N: Tensor
    branches_N: Tensor  # index into the branches of the call
    numbers: dict[str, Tensor]
    token_values: dict[str, Tensor]


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
    """The number of tokens that go into the model, of all sequences of the datum."""
    return sum(_lengths(datum))


def _lengths(datum: Datum) -> list[int]:
    """Of each sequence, those before the last trained one."""
    others = inputs_of(datum.objective, InputKind.TOKENS).values()
    return [_length(tokens) for tokens in (datum, *others)]


def _length(tokens: Datum | Tokens) -> int:
    return len(tokens.loss_mask) - 1 - tokens.loss_mask[::-1].index(True)


def pack(data: Sequence[Datum], rows: Sequence[int], tokens: int) -> list[list[int]]:
    """Groups `rows` by similar length, longest first. A group has at most `tokens` tokens, padding included.

    A datum that is longer than `tokens` is a group of its own. The data must have equally many sequences.
    """
    groups: list[list[int]] = []
    widest: list[int] = []
    for row in sorted(rows, key=lambda row: (-length(data[row]), row)):
        lengths = _lengths(data[row])
        widened = [max(pair) for pair in zip(widest, lengths, strict=True)] if groups else lengths
        if not groups or (len(groups[-1]) + 1) * sum(widened) > tokens:
            groups.append([])
            widened = lengths
        groups[-1].append(row)
        widest = widened
    return groups


def microbatch(data: Sequence[Datum], rows: Sequence[int], branches: Sequence[str], device: torch.device) -> Microbatch:
    """The tensors of the data in `rows`, which must have one kind of objective."""
    chosen = [data[row] for row in rows]
    temperatures = [datum.temperature for datum in chosen]
    own = _sequences(chosen, temperatures, device)

    def per_token(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[own.rows_N]

    others: dict[str, Sequences] = {}
    numbers: dict[str, Tensor] = {}
    token_values: dict[str, Tensor] = {}
    for name, kind, _ in inputs(type(chosen[0].objective)):
        values = [getattr(datum.objective, name) for datum in chosen]
        match kind:
            case InputKind.NUMBER:
                numbers[name] = torch.tensor(values, dtype=torch.float32, device=device)
            case InputKind.TOKEN_VALUES:
                token_values[name] = _flat(values, own.counts, device)
            case InputKind.TOKENS:
                others[name] = _sequences(values, temperatures, device)
    return Microbatch(
        rows=tuple(rows),
        own=own,
        others=others,
        weights_N=per_token([datum.weight for datum in chosen], torch.float32),
        branches_N=per_token([branches.index(datum.branch) for datum in chosen], torch.int64),
        numbers=numbers,
        token_values=token_values,
    )


def _sequences(chosen: Sequence[Datum | Tokens], temperatures: Sequence[float], device: torch.device) -> Sequences:
    width = max(map(_length, chosen))
    input_ids: list[list[int]] = []
    positions: list[int] = []
    targets: list[int] = []
    counts: list[int] = []
    for place, tokens in enumerate(chosen):
        size = _length(tokens)
        input_ids.append([*tokens.token_ids[:size], *([0] * (width - size))])
        trained = [index for index, is_trained in enumerate(tokens.loss_mask) if is_trained]
        positions += [place * width + index - 1 for index in trained]
        targets += [tokens.token_ids[index] for index in trained]
        counts.append(len(trained))
    rows_N = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
    given = [tokens.log_probs if isinstance(tokens, Tokens) else () for tokens in chosen]
    return Sequences(
        counts=tuple(counts),
        input_ids_ST=torch.tensor(input_ids, device=device),
        positions_N=torch.tensor(positions, device=device),
        targets_N=torch.tensor(targets, device=device),
        temperatures_N=torch.tensor(temperatures, dtype=torch.float32, device=device)[rows_N],
        rows_N=rows_N,
        given_N=_flat(given, counts, device),
    )


def _flat(values: Sequence[Sequence[float]], counts: Sequence[int], device: torch.device) -> Tensor:
    """One value per trained token, NaN for sequences that have none."""
    whole = [value for row, count in zip(values, counts, strict=True) for value in row or [math.nan] * count]
    return torch.tensor(whole, dtype=torch.float32, device=device)
