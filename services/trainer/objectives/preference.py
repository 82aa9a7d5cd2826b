"""Direct preference optimisation (DPO, arXiv 2305.18290), with a supervised term on the better answer.

The datum's own tokens are preferred to the rejected ones. Tokens that are not trained, such as an environment's, count
in neither sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mulligan.trainer.objective import Loss, Objective, Terms, Tokens, Unusable, or_computed

if TYPE_CHECKING:
    from torch import Tensor

    from mulligan.trainer.loss_settings import LossSettings


@dataclass(frozen=True, slots=True)
class Preference(Objective):
    """`ftx` is the weight of the supervised term, a mean over the tokens as in LLaMA-Factory's `pref_ftx`.

    The reference's log-probabilities are `reference_log_probs` of the datum's trained tokens and `rejected.log_probs`.
    What is left out is computed by the learner, under the reference that `[loss]` names.
    """

    rejected: Tokens
    beta: float
    ftx: float = 0.0
    reference_log_probs: tuple[float, ...] = ()

    def unusable(self, trained_ids: tuple[int, ...]) -> Unusable | None:
        if self.beta <= 0:
            return Unusable("beta", "a number above 0", str(self.beta))
        if self.ftx < 0:
            return Unusable("ftx", "a number of at least 0", str(self.ftx))
        return None


Inputs = Preference


def loss(terms: Terms, settings: LossSettings) -> Loss:
    """−log σ(β·(log π/π_ref(chosen) − log π/π_ref(rejected))) − ftx·mean log π(chosen), in equal parts for the chosen
    tokens. Metrics: `margin`, what σ is of; `accuracy`, whether it is above 0."""
    rejected = terms.sequence("rejected")
    reference_N = or_computed(terms.token_values["reference_log_probs"], terms.reference)
    rejected_reference_M = or_computed(rejected.given_N, rejected.reference)
    chosen_S = terms.sums(terms.log_probs_N - reference_N)
    rejected_S = rejected.sums(rejected.log_probs_N - rejected_reference_M)
    margin_S = terms.numbers["beta"] * (chosen_S - rejected_S)
    loss_S = -_log_sigmoid(margin_S) - terms.numbers["ftx"] * terms.means(terms.log_probs_N)
    metrics = {"margin": terms.per_token(margin_S), "accuracy": terms.per_token(margin_S > 0)}
    return Loss(terms.shared_out(loss_S), metrics)


def _log_sigmoid(values: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)
