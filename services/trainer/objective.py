"""What an objective of the learner is made of.

An objective is one module. It has a frozen dataclass with slots, a subclass of `Objective` that it exports as `Inputs`:
the fields are what a datum carries for it. And it has a pure function `loss(terms, settings)`, which returns a `Loss`.
The type of a field says what it is:

- `float`: a number of the datum;
- `tuple[float, ...]`: a number for each trained token of the datum, which may be left out if the default is `()`;
- `Tokens`: another token sequence, such as a rejected answer, or the same tokens in another context.

The checks of a datum, its form on the wire and its place in a micro-batch follow from the fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, get_type_hints

from mulligan.common.suggest import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from mulligan.trainer.loss_settings import LossSettings


@dataclass(frozen=True, slots=True)
class Tokens:
    """A token sequence besides the datum's own. `log_probs` are those of its trained tokens under another model, where
    the caller knows them."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    log_probs: tuple[float, ...] = ()


class Unusable(NamedTuple):
    """An input that an objective cannot use."""

    field: str
    expected: str
    got: str


class Objective:
    """Base class of the inputs of an objective.

    `compared` names those `Tokens` that the loss only gives to `Terms.compare`. They have no gradient, so the learner
    runs them apart from the others, without what a backward pass needs.
    """

    __slots__ = ()
    compared: ClassVar[tuple[str, ...]] = ()

    def moves(self, settings: LossSettings) -> bool:
        """Whether the loss can have a gradient. If not, the learner runs the datum forward only, for its metrics."""
        return True

    @property
    def compares_with_old(self) -> bool:
        """Whether it has a field `old_log_probs` for the policy from before the step, which the trainer fills in: where
        it is empty and the step has several optimizer steps, with what Forward gives for the datum."""
        return False

    def unusable(self, trained_ids: tuple[int, ...]) -> Unusable | None:
        """The first input whose value is of no use, or None. Numbers are finite and lengths right when this is asked.
        `trained_ids` are the trained tokens of the datum."""
        return None


class InputKind(StrEnum):
    NUMBER = "number"
    TOKEN_VALUES = "token_values"
    TOKENS = "tokens"


class Input(NamedTuple):
    name: str
    kind: InputKind
    required: bool


_KINDS = {float: InputKind.NUMBER, tuple[float, ...]: InputKind.TOKEN_VALUES, Tokens: InputKind.TOKENS}


_INPUTS: dict[type[Objective], tuple[Input, ...]] = {}


def inputs(objective: type[Objective]) -> tuple[Input, ...]:
    """The fields of an objective. Raises TypeError for a class that is no dataclass, has fields of other types, or
    names in `compared` what is no field of type Tokens."""
    if objective not in _INPUTS:
        found = tuple(_inputs(objective))
        _check_compared(objective.compared, [one.name for one in found if one.kind is InputKind.TOKENS])
        _INPUTS[objective] = found
    return _INPUTS[objective]


def _inputs(objective: type[Objective]) -> Iterator[Input]:
    if not is_dataclass(objective):
        raise TypeError(f"{objective.__name__} is no dataclass")
    hints = get_type_hints(objective)
    for field in fields(objective):
        kind = _KINDS.get(hints[field.name])
        if kind is None:
            raise TypeError(f"{field.name} is no float, tuple[float, ...] or Tokens")
        yield Input(field.name, kind, field.default is MISSING)


def _check_compared(compared: tuple[str, ...], tokens: list[str]) -> None:
    if isinstance(compared, str):
        raise TypeError(f"compared: expected a tuple, ({compared!r},); got a text")
    for name in compared:
        if name not in tokens:
            near = did_you_mean(name, tokens)
            raise TypeError(f"compared: expected names of fields of type Tokens; got {name!r}{near}")


def inputs_of(objective: Objective, kind: InputKind) -> dict[str, Any]:
    """The inputs of one kind, by name."""
    return {one.name: getattr(objective, one.name) for one in inputs(type(objective)) if one.kind is kind}


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """One token sequence of each datum of a micro-batch, under the model.

    Shapes: _S data, _N trained tokens, one datum after another. Log-probabilities are in nats, at the data's
    temperatures. `entropy_N` has a gradient only with an `entropy_coefficient`. `reference` computes the
    log-probabilities of the same tokens under the reference model, without gradient.
    """

    log_probs_N: Tensor
    entropy_N: Tensor
    rows_N: Tensor  # index of each token's datum
    counts_S: Tensor  # trained tokens of each datum
    reference: Callable[[], Tensor]
    given_N: Tensor | None = None  # `log_probs` of the `Tokens`; NaN where they were left out

    def sums(self, values_N: Tensor) -> Tensor:
        """The sum over the trained tokens of each datum, _S."""
        return values_N.new_zeros(len(self.counts_S)).index_add(0, self.rows_N, values_N)

    def means(self, values_N: Tensor) -> Tensor:
        """The mean over the trained tokens of each datum, _S."""
        return self.sums(values_N) / self.counts_S

    def per_token(self, values_S: Tensor) -> Tensor:
        """The value of each token's datum, _N."""
        return values_S[self.rows_N]

    def shared_out(self, values_S: Tensor) -> Tensor:
        """The value of each datum in equal parts for its trained tokens, _N: they add up to it."""
        return (values_S / self.counts_S)[self.rows_N]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms(ScoredTokens):
    """What the loss of a micro-batch is computed from: the data's own sequences under the model, and the inputs.

    `sequence(name)` gives the `Tokens` of that name under the model, with gradient; it raises ValueError for those in
    `Objective.compared`. `compare(name, function, *values_N)` is for functions of whole distributions over the
    vocabulary _V. It calls `function(own_PV, other_PV, *values_P)` with pieces of bounded size: log-probabilities at
    the trained tokens of the data, and at those of the `Tokens`, which are as many and have no gradient. The function
    returns a value per token.
    """

    numbers: Mapping[str, Tensor]  # _S
    token_values: Mapping[str, Tensor]  # _N; NaN for data that left them out
    sequence: Callable[[str], ScoredTokens]
    compare: Callable[..., Tensor]


class Loss(NamedTuple):
    """The loss of each trained token; that of a datum is their sum, times its weight. Metrics are means per trained
    token."""

    loss_N: Tensor
    metrics: Mapping[str, Tensor] = {}


def where_given(values_N: Tensor, others_N: Tensor) -> Tensor:
    """The values, with the others in the place of those that were left out."""
    return others_N.where(values_N.isnan(), values_N)


def or_computed(values_N: Tensor | None, compute: Callable[[], Tensor]) -> Tensor:
    """As `where_given`. The others are computed only if values were left out."""
    if values_N is None:
        return compute()
    return where_given(values_N, compute()) if values_N.isnan().any() else values_N
