"""Runs the model on a micro-batch, for the loss of its objective."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from mulligan.trainer.learner.batching import Microbatch, Sequences
from mulligan.trainer.learner.model import PolicyModel
from mulligan.trainer.objective import ScoredTokens, Terms
from mulligan.trainer.settings import LossSettings


def terms_of(model: PolicyModel, batch: Microbatch, loss: LossSettings) -> Terms:
    """Runs the data's own sequences. All else that a loss may need runs when the loss asks for it."""
    hidden_NH = model.hidden(batch.own)
    log_probs_N, entropy_N = model.score(hidden_NH, batch.own, entropy_gradient=loss.entropy_coefficient > 0)

    def sequence(name: str) -> ScoredTokens:
        other = batch.others[name]
        log_probs_N, entropy_N = model.token_log_probs(other)
        return ScoredTokens(
            log_probs_N,
            entropy_N,
            other.rows_N,
            _counts(other, log_probs_N),
            partial(model.reference_log_probs, other, loss.kl_reference),
            other.given_N,
        )

    return Terms(
        log_probs_N,
        entropy_N,
        batch.own.rows_N,
        _counts(batch.own, log_probs_N),
        partial(model.reference_log_probs, batch.own, loss.kl_reference),
        numbers=batch.numbers,
        token_values=batch.token_values,
        sequence=sequence,
        compare=partial(model.compare, hidden_NH, batch.own, batch.others),
    )


def _counts(sequences: Sequences, like: Tensor) -> Tensor:
    return like.new_tensor(sequences.counts)
