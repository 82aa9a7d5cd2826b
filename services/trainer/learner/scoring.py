"""Runs the model on a micro-batch, for the losses of its objectives."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import cached_property, partial

import torch
from torch import Tensor

from mulligan.trainer.learner.batching import Microbatch, Part, Sequences
from mulligan.trainer.learner.model import PolicyModel
from mulligan.trainer.learner.ranks import Ranks
from mulligan.trainer.objective import ScoredTokens, Terms
from mulligan.trainer.settings import LossSettings


class _Pass(IntEnum):
    """What a process runs next. If several want different passes, all run the one that stands first here."""

    REFERENCE = 0
    COMPARED = 1
    NONE = 2


class Scoring:
    """A micro-batch under the model. The sequences with gradient run at once; the reference and what is compared with
    run when a loss asks for them first. Shape: _P the tokens of the input, rows one after another.

    With several processes, a loss may ask for these passes in some of them only, as it sees other data in each. The
    weights are shared out, so the others then run the pass, too, and drop what it gives. After the losses, `end` does
    so until no process asks for more.
    """

    def __init__(self, model: PolicyModel, batch: Microbatch, loss: LossSettings, ranks: Ranks):
        self._ranks = ranks
        self._model = model
        self._batch = batch
        self._loss = loss
        self._hidden_PH = model.hidden(batch.trained)

    def terms(self, part: Part) -> Terms:
        """What the loss of a part of the micro-batch is computed from."""
        own_NH = self._hidden_PH[part.own.places_N]
        log_probs_N, entropy_N = self._model.score(
            own_NH, part.own, entropy_gradient=self._loss.entropy_coefficient > 0
        )
        return Terms(
            log_probs_N,
            entropy_N,
            part.own.rows_N,
            _counts(part.own, log_probs_N),
            partial(self._reference, part.own),
            numbers=part.numbers,
            token_values=part.token_values,
            sequence=partial(self._sequence, part),
            compare=partial(self._compare, part, own_NH),
        )

    def end(self) -> None:
        self._agree(_Pass.NONE)

    def _agree(self, wanted: _Pass) -> None:
        """Returns when all processes are to run this pass. Until then this one takes part in those that others want."""
        while (chosen := self._ranks.least(wanted)) != wanted:
            if chosen == _Pass.REFERENCE:
                self._reference_log_probs(self._batch.parts[0].own)
            else:
                _ = self._compared_hidden

    @cached_property
    def _reference_hidden(self) -> Tensor:
        return self._model.reference_hidden(self._batch.trained, self._loss.kl_reference)

    @cached_property
    def _compared_hidden(self) -> Tensor:
        with torch.no_grad():  # a process that compares nothing may have to run the model
            return self._model.hidden(self._batch.compared or self._batch.trained)

    def _reference(self, sequences: Sequences) -> Tensor:
        self._agree(_Pass.REFERENCE)
        return self._reference_log_probs(sequences)

    def _reference_log_probs(self, sequences: Sequences) -> Tensor:
        hidden_NH = self._reference_hidden[sequences.places_N]
        return self._model.reference_log_probs(hidden_NH, sequences, self._loss.kl_reference)

    def _sequence(self, part: Part, name: str) -> ScoredTokens:
        if name in part.kind.compared:
            raise ValueError(f"{part.kind.__name__}.{name} is in `compared`: it has no gradient")
        other = part.others[name]
        log_probs_N, entropy_N = self._model.score(self._hidden_PH[other.places_N], other)
        return ScoredTokens(
            log_probs_N,
            entropy_N,
            other.rows_N,
            _counts(other, log_probs_N),
            partial(self._reference, other),
            other.given_N,
        )

    def _compare(
        self, part: Part, own_NH: Tensor, name: str, function: Callable[..., Tensor], *values_N: Tensor
    ) -> Tensor:
        if name in part.kind.compared:
            self._agree(_Pass.COMPARED)
            hidden_PH = self._compared_hidden
        else:
            hidden_PH = self._hidden_PH.detach()
        return self._model.compare(own_NH, hidden_PH[part.others[name].places_N], part.own, function, *values_N)


def _counts(sequences: Sequences, like: Tensor) -> Tensor:
    return like.new_tensor(sequences.counts)
