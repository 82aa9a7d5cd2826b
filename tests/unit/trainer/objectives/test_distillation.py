"""Distillation: supervised, and without any log-probabilities of sampling."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mulligan.trainer.data import Distillation
from mulligan.trainer.learner.wire import data_from_proto
from mulligan.trainer.losses import ppo
from mulligan.trainer.objective import InputKind, inputs
from mulligan.trainer.objectives.distillation import loss
from mulligan.trainer.v1 import learner_service_pb2 as pb
from tests.support.terms import gradient, terms

LOG_PROBS = st.floats(-100, 0, width=32)


def test_its_loss_is_minus_the_weighted_log_probability() -> None:
    log_probs = torch.tensor([-2.0, -0.5], requires_grad=True)
    found = loss(terms([1, 1], log_probs, numbers={"target_weight": torch.tensor([0.5, 2.0])}), ppo.Settings())
    assert found.loss_N.tolist() == [1.0, 1.0] and found.metrics == {}
    assert gradient(found.loss_N, log_probs)[0].tolist() == [-0.5, -2.0]


def test_it_has_no_room_for_importance_weights() -> None:
    """Neither in its data nor in its message is there a place for log-probabilities of sampling."""
    assert inputs(Distillation) == (("target_weight", InputKind.NUMBER, True),)
    with pytest.raises(TypeError):
        Distillation(1.0, (-1.0,))  # type: ignore[call-arg]
    assert [field.name for field in pb.Distillation.DESCRIPTOR.fields] == ["target_weight"]
    [datum] = data_from_proto([pb.Datum(distillation=pb.Distillation(target_weight=0.5))])
    assert datum.objective == Distillation(0.5)


@given(LOG_PROBS, LOG_PROBS, st.floats(0, 10, width=32))
def test_it_pulls_equally_wherever_the_probability_is(first: float, second: float, weight: float) -> None:
    """Its gradient is −w for every log-probability: nothing clips or reweighs it."""
    log_probs = torch.tensor([first, second], requires_grad=True)
    found = loss(terms([2], log_probs, numbers={"target_weight": torch.tensor([weight])}), ppo.Settings())
    assert gradient(found.loss_N, log_probs)[0].tolist() == [-weight, -weight]


def test_without_weight_it_cannot_move_the_model() -> None:
    assert Distillation(1.0).moves(ppo.Settings()) and not Distillation(0.0).moves(ppo.Settings())
