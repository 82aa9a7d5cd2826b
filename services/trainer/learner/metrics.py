"""Metrics of training: summed on the device while micro-batches run, and read once at the end.

A metric is `loss` (a sum: the loss that was differentiated), `tokens` (a count) or a mean per trained token. Each is
reported per branch as BRANCH/NAME and over all branches that have it as NAME. Two counts are of the call alone, as
branches share what they count: `sequence_tokens` and `computed_tokens`, the tokens that went through the model in
sequences, and those that it computed for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mulligan.trainer.learner.ranks import Ranks

_SUMS = ("loss", "tokens")
_OF_CALL = ("sequence_tokens", "computed_tokens")


class Tally:
    """Sums and counts of each metric, per branch, over the micro-batches of a call."""

    def __init__(self, branches: Sequence[str], device: torch.device):
        self.branches = list(branches)
        self._device = device
        self._sums: dict[str, Tensor] = {}  # each of one value per branch
        self._counts: dict[str, Tensor] = {}
        self._of_call = dict.fromkeys(_OF_CALL, 0.0)

    def count(self, sequence_tokens: int, computed_tokens: int) -> None:
        """Adds a micro-batch, which holds so many tokens in its sequences, and cost so many."""
        self._of_call["sequence_tokens"] += sequence_tokens
        self._of_call["computed_tokens"] += computed_tokens

    def add(self, branches_N: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Adds one value per token and column; `branches_N` holds indices into `branches`."""
        ones_N = torch.ones_like(branches_N, dtype=torch.float64)
        for name, values_N in {"tokens": ones_N, **columns}.items():
            self._know(name)
            self._sums[name].index_add_(0, branches_N, values_N.detach().double())
            self._counts[name].index_add_(0, branches_N, ones_N)

    def _know(self, name: str) -> None:
        if name not in self._sums:
            self._sums[name] = torch.zeros(len(self.branches), dtype=torch.float64, device=self._device)
            self._counts[name] = torch.zeros_like(self._sums[name])

    def add_up(self, ranks: Ranks) -> None:
        """Adds the values of the other processes, which may have other metrics."""
        if ranks.size == 1:
            return
        names = sorted({name for of_rank in ranks.gather(list(self._sums)) for name in of_rank})
        if not names:
            return
        for name in names:
            self._know(name)
        of_call = torch.tensor(list(self._of_call.values()), dtype=torch.float64, device=self._device)
        ranks.sum(of_call)
        self._of_call = dict(zip(self._of_call, of_call.tolist(), strict=True))
        values = torch.stack([of_all[name] for of_all in (self._sums, self._counts) for name in names])
        ranks.sum(values)
        sums, counts = values.chunk(2)
        self._sums = dict(zip(names, sums, strict=True))
        self._counts = dict(zip(names, counts, strict=True))

    def metrics(self) -> dict[str, float]:
        branches: dict[str, dict[str, float]] = {branch: {} for branch in self.branches}
        for name, sums in self._sums.items():
            counts = self._counts[name].tolist()
            for branch, total, count in zip(self.branches, sums.tolist(), counts, strict=True):
                if count:
                    branches[branch][name] = total if name in _SUMS else total / count
        return _flatten(branches) | (self._of_call if self._sums else {})


def merge(calls: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Merges the metrics of several calls into those of one call with all data."""
    branches: dict[str, dict[str, float]] = {}
    for metrics in calls:
        for key, value in metrics.items():
            branch, slash, name = key.rpartition("/")
            if slash:
                factor = 1.0 if name in _SUMS else metrics[f"{branch}/tokens"]
                sums = branches.setdefault(branch, {})
                sums[name] = sums.get(name, 0.0) + value * factor
    for values in branches.values():
        for name in values:
            if name not in _SUMS:
                values[name] /= values["tokens"]
    of_calls = {name: sum(call[name] for call in calls if name in call) for name in _OF_CALL}
    return _flatten(branches) | {name: value for name, value in of_calls.items() if value}


def _flatten(branches: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    flat = {f"{branch}/{name}": value for branch, values in branches.items() for name, value in values.items()}
    for name in sorted({name for values in branches.values() for name in values}):
        having = [values for values in branches.values() if name in values]
        if name in _SUMS:
            flat[name] = sum(values[name] for values in having)
        else:
            tokens = sum(values["tokens"] for values in having)
            flat[name] = sum(values[name] * values["tokens"] for values in having) / tokens
    return flat
