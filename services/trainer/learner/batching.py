"""From data to tensors: `check` validates the data of a call, `pack` groups those that belong together, and
`microbatch` makes the tensors of a group, whose size is bounded.

A micro-batch is one pass of the model over all its sequences, whatever their objectives. Where the model can compute a
prefix tree (`tree_attention`), the sequences are one, and what they share at their begin is computed once. Elsewhere
they are rows of equal length, padded on the right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from mulligan.common.errors import DomainError, invalid_field
from mulligan.trainer.data import Datum, ModelLimits, datum_problem
from mulligan.trainer.learner import prefix_tree as trees
from mulligan.trainer.learner.balance import wall
from mulligan.trainer.learner.prefix_tree import Nodes, PrefixTree, TreeSize
from mulligan.trainer.objective import InputKind, Objective, Tokens, inputs, inputs_of


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What goes through the model in one pass. Shapes: _R rows, _T tokens; a prefix tree is one row.

    Rows without a tree have no attention mask: in a causal model no token sees the padding on its right, and padding is
    not trained. A sequence ends before its last trained token, because that one is only predicted.
    """

    token_ids_RT: Tensor
    positions_RT: Tensor | None  # None: from 0 in each row
    tree: PrefixTree | None
    sequence_tokens: int  # the tokens of all sequences, each counted alone

    @property
    def computed_tokens(self) -> int:
        """Those that the model computes: shared ones once; padding, too."""
        return self.token_ids_RT.numel()


@dataclass(frozen=True, slots=True)
class Sequences:
    """A token sequence of each datum of a part. Shape: _N trained tokens, one sequence after another."""

    counts: tuple[int, ...]  # trained tokens of each sequence
    places_N: Tensor  # in the flattened _RT of the input: where each trained token is predicted
    targets_N: Tensor  # ids of the trained tokens
    temperatures_N: Tensor
    rows_N: Tensor  # index of each token's sequence
    given_N: Tensor  # log-probabilities that the caller gave; NaN without


@dataclass(frozen=True, slots=True)
class Part:
    """The data of a micro-batch that have one kind of objective.

    The inputs of the objective are there by name: numbers, one for each datum (_S); token values, one for each trained
    token (_N), NaN for data that left them out; further sequences. Those that the objective only compares with
    (`Objective.compared`) have their places in `Microbatch.compared`.
    """

    kind: type[Objective]
    rows: tuple[int, ...]  # index of each datum in the caller's data
    own: Sequences
    others: dict[str, Sequences]
    weights_N: Tensor
    branches_N: Tensor  # index into the branches of the call
    numbers: dict[str, Tensor]
    token_values: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Microbatch:
    """The tensors of a group of data, in one part for each kind of objective."""

    parts: tuple[Part, ...]
    trained: ModelInput
    compared: ModelInput | None  # runs without gradient


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


def length(tokens: Datum | Tokens) -> int:
    """The number of tokens that go into the model: those before the last trained one."""
    return len(tokens.loss_mask) - 1 - tokens.loss_mask[::-1].index(True)


def _key(tokens: Datum | Tokens) -> bytes:
    return trees.key(tokens.token_ids[: length(tokens)])


def _sequences(datum: Datum) -> dict[str, Datum | Tokens]:
    """All sequences of the datum by the names of its inputs; its own has none."""
    return {"": datum, **inputs_of(datum.objective, InputKind.TOKENS)}


def pack(data: Sequence[Datum], rows: Iterable[int], tokens: int, *, sharing: bool) -> list[list[int]]:
    """Groups `rows` so that the model computes at most `tokens` tokens for each group: with `sharing` those of its
    prefix trees, otherwise rows of equal length. A datum that needs more is a group of its own."""
    return list(_pack_trees(data, rows, tokens) if sharing else _pack_padded(data, rows, tokens))


def packed(
    data: Sequence[Datum], rows: Sequence[int], tokens: int, processes: int, *, sharing: bool
) -> tuple[list[list[int]], list[int]]:
    """Groups as of `pack`, and the `cost` of each. Several processes need several groups each, to be dealt out evenly;
    the smaller the groups, the less they share. So a few bounds are tried. The one is taken with which the processes
    compute and wait for the fewest tokens."""
    bounds = [tokens]
    if processes > 1:
        alone = sum(length(data[row]) for row in rows)
        once = cost(data, rows, sharing=True) if sharing and rows else alone
        parts = (alone // (2 * processes), once // (2 * processes), once // (3 * processes))
        bounds = [min(tokens, part) for part in dict.fromkeys(parts)]
    found = []
    for bound in bounds:
        groups = pack(data, rows, bound, sharing=sharing)
        found.append((groups, [cost(data, group, sharing=sharing) for group in groups]))
    return min(found, key=lambda each: wall(each[1], processes))


def _pack_trees(data: Sequence[Datum], rows: Iterable[int], tokens: int) -> Iterator[list[int]]:
    """In the order of the data's tokens, so that those that share a prefix are neighbours."""
    group: list[int] = []
    sizes = TreeSize(), TreeSize()  # of the sequences with gradient, and of those that are compared with
    for row in sorted(rows, key=lambda row: (_key(data[row]), row)):
        _grow(sizes, data[row])
        if group and sizes[0].nodes + sizes[1].nodes > tokens:
            yield group
            group = []
            sizes = TreeSize(), TreeSize()
            _grow(sizes, data[row])
        group.append(row)
    if group:
        yield group


def _grow(sizes: tuple[TreeSize, TreeSize], datum: Datum) -> None:
    for name, tokens in _sequences(datum).items():
        sizes[name in datum.objective.compared].add(_key(tokens))


def _pack_padded(data: Sequence[Datum], rows: Iterable[int], tokens: int) -> Iterator[list[int]]:
    """Longest first, so that neighbours have similar lengths."""
    lengths = {row: [length(tokens) for tokens in _sequences(data[row]).values()] for row in rows}
    group: list[int] = []
    count = width = 0
    for row in sorted(lengths, key=lambda row: (-max(lengths[row]), row)):
        if group and (count + len(lengths[row])) * width > tokens:
            yield group
            group = []
        if not group:
            count, width = 0, max(lengths[row])
        group.append(row)
        count += len(lengths[row])
    if group:
        yield group


def cost(data: Sequence[Datum], group: Sequence[int], *, sharing: bool) -> int:
    """The tokens that the model computes for a group of `pack`."""
    if not sharing:
        lengths = [length(tokens) for row in group for tokens in _sequences(data[row]).values()]
        return len(lengths) * max(lengths)
    sizes = TreeSize(), TreeSize()
    for row in group:
        _grow(sizes, data[row])
    return sizes[0].nodes + sizes[1].nodes


def microbatch(
    data: Sequence[Datum], rows: Sequence[int], branches: Sequence[str], device: torch.device, *, sharing: bool
) -> Microbatch:
    """The tensors of the data in `rows`."""
    run: dict[bool, ModelInput] = {}
    places: dict[tuple[int, str], Nodes] = {}
    for compared in (False, True):
        chosen = {
            (row, name): tokens
            for row in rows
            for name, tokens in _sequences(data[row]).items()
            if (name in data[row].objective.compared) is compared
        }
        if chosen:
            run[compared], found = _model_input(list(chosen.values()), device, sharing)
            places |= zip(chosen, found, strict=True)
    kinds: dict[type[Objective], list[int]] = {}
    for row in rows:
        kinds.setdefault(type(data[row].objective), []).append(row)
    parts = tuple(_part(data, own, places, branches, device) for own in kinds.values())
    return Microbatch(parts, run[False], run.get(True))


def _model_input(
    chosen: Sequence[Datum | Tokens], device: torch.device, sharing: bool
) -> tuple[ModelInput, list[Nodes]]:
    """The input, and for each sequence where in it the trained tokens are predicted."""
    before = [np.flatnonzero(tokens.loss_mask) - 1 for tokens in chosen]
    total = sum(map(length, chosen))
    if sharing:
        layout = trees.lay_out([_key(tokens) for tokens in chosen], device)
        ids_1T, depths_1T = (torch.from_numpy(each)[None].to(device) for each in (layout.token_ids_T, layout.depths_T))
        places = [path[positions] for path, positions in zip(layout.paths, before, strict=True)]
        return ModelInput(ids_1T, depths_1T, layout.tree, total), places
    ids_RT = np.zeros((len(chosen), max(map(length, chosen))), np.int64)
    for row, tokens in enumerate(chosen):
        ids_RT[row, : length(tokens)] = tokens.token_ids[: length(tokens)]
    places = [row * ids_RT.shape[1] + positions for row, positions in enumerate(before)]
    return ModelInput(torch.from_numpy(ids_RT).to(device), None, None, total), places


def _part(
    data: Sequence[Datum],
    rows: Sequence[int],
    places: Mapping[tuple[int, str], Nodes],
    branches: Sequence[str],
    device: torch.device,
) -> Part:
    """The part of the data in `rows`, which have one kind of objective."""
    chosen = [data[row] for row in rows]

    def sequences(name: str) -> Sequences:
        tokens = [_sequences(datum)[name] for datum in chosen]
        temperatures = [datum.temperature for datum in chosen]
        return _tensors(tokens, [places[row, name] for row in rows], temperatures, device)

    own = sequences("")

    def per_token(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[own.rows_N]

    others: dict[str, Sequences] = {}
    numbers: dict[str, Tensor] = {}
    token_values: dict[str, Tensor] = {}
    kind_of_objective = type(chosen[0].objective)
    for name, kind, _ in inputs(kind_of_objective):
        values = [getattr(datum.objective, name) for datum in chosen]
        match kind:
            case InputKind.NUMBER:
                numbers[name] = torch.tensor(values, dtype=torch.float32, device=device)
            case InputKind.TOKEN_VALUES:
                token_values[name] = _flat(values, own.counts, device)
            case InputKind.TOKENS:
                others[name] = sequences(name)
    return Part(
        kind=kind_of_objective,
        rows=tuple(rows),
        own=own,
        others=others,
        weights_N=per_token([datum.weight for datum in chosen], torch.float32),
        branches_N=per_token([branches.index(datum.branch) for datum in chosen], torch.int64),
        numbers=numbers,
        token_values=token_values,
    )


def _tensors(
    chosen: Sequence[Datum | Tokens], places: Sequence[Nodes], temperatures: Sequence[float], device: torch.device
) -> Sequences:
    counts = [len(each) for each in places]
    rows_N = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
    given = [tokens.log_probs if isinstance(tokens, Tokens) else () for tokens in chosen]
    targets = [id_ for tokens in chosen for id_ in compress(tokens.token_ids, tokens.loss_mask)]
    return Sequences(
        counts=tuple(counts),
        places_N=torch.from_numpy(np.concatenate(places)).to(device),
        targets_N=torch.tensor(targets, device=device),
        temperatures_N=torch.tensor(temperatures, dtype=torch.float32, device=device)[rows_N],
        rows_N=rows_N,
        given_N=_flat(given, counts, device),
    )


def _flat(values: Sequence[Sequence[float]], counts: Sequence[int], device: torch.device) -> Tensor:
    """One value per trained token, NaN for sequences that have none."""
    whole = [value for row, count in zip(values, counts, strict=True) for value in row or [math.nan] * count]
    return torch.tensor(whole, dtype=torch.float32, device=device)
