"""An objective names its inputs by their types; checks, form on the wire and batches follow from that."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.plugins import UnusablePlugin
from mulligan.trainer.data import Datum, ModelLimits, PolicyGradient, datum_problem
from mulligan.trainer.learner.batching import length, pack
from mulligan.trainer.learner.wire import data_from_proto, data_to_proto
from mulligan.trainer.losses import ppo
from mulligan.trainer.objective import Input, InputKind, Objective, Tokens, inputs
from mulligan.trainer.objectives import OBJECTIVES, name_of, named
from mulligan.trainer.objectives.coefficients import Coefficients
from mulligan.trainer.objectives.divergence import Divergence
from mulligan.trainer.objectives.negative_aware import NegativeAware
from mulligan.trainer.objectives.preference import Preference
from mulligan.trainer.objectives.transfer import Transfer
from mulligan.trainer.v1 import learner_service_pb2 as pb
from tests.support.learning import distilled, sampled

LIMITS = ModelLimits(32, 64)
TOKENS = (2, 3, 4, 5)
MASK = (False, False, True, True)
OTHER = Tokens((9, 4, 5), (False, True, True), (-0.5, -1.5))


def datum(objective: Objective) -> Datum:
    return Datum("d", TOKENS, MASK, 0.5, 0.7, objective, "mine")


DATA = [
    sampled(),
    replace(sampled(), objective=PolicyGradient(0.0, (-1.0, -2.0), (), (0.5, -0.5))),
    distilled(),
    datum(Coefficients((0.5, -0.25))),
    datum(Preference(OTHER, 0.1, 0.5, (-1.0, -2.0))),
    datum(Preference(replace(OTHER, log_probs=()), 0.1)),
    datum(Divergence(OTHER, 0.5)),
    datum(NegativeAware(1.0, 0.5)),
    datum(NegativeAware(0.0, 0.5, (-1.0, -2.0))),
    datum(Transfer(-1.0, 0.25)),
    datum(Transfer(0.0, 0.0, (-1.0, -2.0), 1.0, (0.5, -0.5))),
]


def test_the_types_of_the_fields_say_what_the_inputs_are() -> None:
    assert inputs(Preference) == (
        Input("rejected", InputKind.TOKENS, True),
        Input("beta", InputKind.NUMBER, True),
        Input("ftx", InputKind.NUMBER, False),
        Input("reference_log_probs", InputKind.TOKEN_VALUES, False),
    )


@pytest.mark.parametrize("one", DATA, ids=lambda one: f"{name_of(type(one.objective))}")
def test_data_survive_the_wire(one: Datum) -> None:
    [message] = data_to_proto([one])
    assert data_from_proto([pb.Datum.FromString(message.SerializeToString())]) == [one]
    assert datum_problem(one, LIMITS) is None


def test_all_objectives_that_come_along_are_tried() -> None:
    assert {name_of(type(one.objective)) for one in DATA} == set(OBJECTIVES.built_in)
    for name in OBJECTIVES.built_in:
        assert name_of(named(name)) == name


PG = PolicyGradient(0.0, (-1.0, -2.0))
BAD: list[tuple[Objective, str]] = [
    (replace(PG, advantages=(1.0,)), "policy_gradient.advantages"),
    (replace(PG, advantages=(1.0, math.inf)), "policy_gradient.advantages"),
    (replace(PG, advantage=1.0, advantages=(1.0, 1.0)), "policy_gradient.advantage"),
    (Coefficients((1.0,)), 'custom.token_values["coefficients"]'),
    (Coefficients(()), 'custom.token_values["coefficients"]'),
    (Coefficients((1.0, math.nan)), 'custom.token_values["coefficients"]'),
    (Preference(OTHER, math.nan), 'custom.numbers["beta"]'),
    (Preference(OTHER, 0.0), 'custom.numbers["beta"]'),
    (Preference(replace(OTHER, token_ids=(9, 4, 32)), 0.1), 'custom.sequences["rejected"].token_ids[2]'),
    (Preference(replace(OTHER, token_ids=(9,) * 65), 0.1), 'custom.sequences["rejected"].token_ids'),
    (Preference(replace(OTHER, loss_mask=(True, True, False)), 0.1), 'custom.sequences["rejected"].loss_mask[0]'),
    (Preference(replace(OTHER, loss_mask=(False,) * 3), 0.1), 'custom.sequences["rejected"].loss_mask'),
    (Preference(replace(OTHER, log_probs=(-1.0,)), 0.1), 'custom.sequences["rejected"].log_probs'),
    (Divergence(replace(OTHER, token_ids=(9, 4, 6))), 'custom.sequences["teacher"]'),
    (NegativeAware(0.5, 0.5), 'custom.numbers["right"]'),
    (Transfer(1.0, 0.1, ratio=1.0), 'custom.numbers["shape"]'),
    (Transfer(1.0, 0.0, (-1.0, -2.0)), 'custom.token_values["old_log_probs"]'),
]


@pytest.mark.parametrize(("objective", "field"), BAD)
def test_bad_inputs_are_named(objective: Objective, field: str) -> None:
    found = datum_problem(datum(objective), LIMITS)
    assert found is not None and found.field == field


def test_the_expected_length_is_told() -> None:
    found = datum_problem(datum(Coefficients((1.0,))), LIMITS)
    assert found is not None and (found.expected, found.got) == ("one value per trained token, 2", "1")


def custom(name: str = "preference", **parts: Any) -> pb.Datum:
    objective = pb.Objective(name=name, numbers=parts.get("numbers", {}))
    for key, values in parts.get("token_values", {}).items():
        objective.token_values[key].values.extend(values)
    for key in parts.get("sequences", ["rejected"]):
        objective.sequences[key].token_ids.extend((2, 3))
    return pb.Datum(custom=objective)


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        (custom("preferance"), "custom.name", "there is no objective 'preferance'; did you mean 'preference'?"),
        (custom("tests.support.dice"), "custom.name", "it has no `Inputs`"),
        (custom("policy_gradient"), "custom.name", "has a field of its own"),
        (custom(""), "custom.name", "there is no objective ''"),
        (custom(), 'custom.numbers["beta"]', "preference needs it"),
        (custom(numbers={"beta": 0.1, "fts": 1.0}), 'custom.numbers["fts"]', "did you mean 'ftx'?"),
        (custom(numbers={"beta": 0.1}, token_values={"xyz": [1.0]}), 'custom.token_values["xyz"]', "it has reference"),
        (
            custom(numbers={"beta": 0.1}, sequences=["rejcted"]),
            'custom.sequences["rejcted"]',
            "did you mean 'rejected'?",
        ),
        (custom(numbers={"beta": 0.1}, sequences=[]), 'custom.sequences["rejected"]', "preference needs it"),
        (pb.Datum(), "objective", "policy_gradient, distillation or custom"),
    ],
)
def test_what_an_objective_does_not_have_is_named(message: pb.Datum, field: str, words: str) -> None:
    with pytest.raises(DomainError) as caught:
        data_from_proto([pb.Datum(distillation=pb.Distillation()), message])
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_FIELD, f"data[1].{field}")
    assert words in caught.value.message


@pytest.mark.parametrize("sharing", [False, True])
def test_a_micro_batch_has_room_for_all_sequences(sharing: bool) -> None:
    """Groups stay within the budget, padding of both sequences included; shared prefixes count once."""
    lengths = [(5, 30), (6, 6), (30, 5), (7, 20), (3, 3), (12, 12)]
    data = [
        replace(
            datum(Preference(Tokens((2,) * other, (False,) * (other - 1) + (True,)), 0.1)),
            token_ids=(2,) * own,
            loss_mask=(False,) * (own - 1) + (True,),
        )
        for own, other in lengths
    ]
    groups = pack(data, range(len(data)), 60, sharing=sharing)
    assert sorted(row for group in groups for row in group) == list(range(len(data)))
    for group in groups:
        inputs = [length(tokens) for row in group for tokens in (data[row], data[row].objective.rejected)]  # type: ignore[attr-defined]
        needed = max(inputs) if sharing else len(inputs) * max(inputs)  # all begin alike
        assert len(group) == 1 or needed <= 60
    assert len(groups) == 1 if sharing else len(groups) > 1


@dataclass(frozen=True, slots=True)
class Odd(Objective):
    words: str


class Undeclared(Objective):
    pass


@dataclass(frozen=True, slots=True)
class Misspelt(Objective):
    compared: ClassVar[tuple[str, ...]] = ("techer",)
    teacher: Tokens


@dataclass(frozen=True, slots=True)
class WithoutComma(Objective):
    compared: ClassVar[tuple[str, ...]] = "teacher"  # type: ignore[assignment]
    teacher: Tokens


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Odd, "words is no float"),
        (Undeclared, "is no dataclass"),
        (Misspelt, "compared: expected names of fields of type Tokens; got 'techer'; did you mean 'teacher'?"),
        (WithoutComma, "compared: expected a tuple, ('teacher',); got a text"),
    ],
)
def test_other_inputs_are_refused(kind: type[Objective], words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        inputs(kind)


def test_a_module_without_inputs_is_no_objective() -> None:
    with pytest.raises(UnusablePlugin, match="its `Inputs` is no Objective"):
        named("tests.support.odd_objective")


def test_a_policy_gradient_moves_with_any_advantage_or_with_a_common_term() -> None:
    still = ppo.Settings(kl_coefficient=0.0)
    assert not PG.moves(still) and replace(PG, advantages=(0.0, 0.1)).moves(still)
    assert PG.moves(ppo.Settings()) and PG.moves(ppo.Settings(kl_coefficient=0.0, entropy_coefficient=0.1))
