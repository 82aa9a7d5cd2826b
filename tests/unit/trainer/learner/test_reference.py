"""The reference that moves with the learner."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.loss_terms import KlReference
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import LoraSettings
from tests.support.learning import FULL, LORA, make, many, sampled, weights_digest
from tests.support.tiny_model import write_tiny_model

MOVING = ppo.Settings(kl_coefficient=0.5, kl_reference=KlReference.MOVING, reference_every=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def learn(learner: Learner, steps: range) -> list[float]:
    """The divergence before each step."""
    found: list[float] = []
    for step in steps:
        found.append(learner.forward_backward(many(6, seed=step), MOVING)["first/kl"])
        learner.optim_step()
    return found


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_it_moves_each_time_that_so_many_steps_have_been_taken(
    tiny: Path, tmp_path: Path, lora: LoraSettings | None
) -> None:
    divergences = learn(make(tiny, tmp_path, lora), range(7))
    assert [step for step, value in enumerate(divergences) if value == 0.0] == [0, 3, 6]


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_the_divergence_is_that_to_the_weights_of_then(tiny: Path, tmp_path: Path, lora: LoraSettings | None) -> None:
    learner = make(tiny, tmp_path, lora)
    learn(learner, range(3))
    then = learner.forward([sampled()])[0]
    learn(learner, range(3, 5))
    now = learner.forward([sampled()])[0]
    digest = weights_digest(learner)
    expected = sum(math.expm1(b - a) - (b - a) for a, b in zip(now, then, strict=True)) / 2
    assert learner.forward_backward([sampled()], MOVING)["first/kl"] == pytest.approx(expected, rel=1e-3)
    assert weights_digest(learner) == digest
    initial = learner.forward_backward([sampled()], ppo.Settings(kl_coefficient=0.5))["first/kl"]
    assert initial != pytest.approx(expected, rel=1e-2)


@pytest.fixture(scope="module", params=[FULL, LORA])
def uninterrupted(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoraSettings | None, str]:
    """What is trained, and the digest of its weights after seven steps."""
    whole = make(tiny, tmp_path_factory.mktemp("whole"), request.param)
    learn(whole, range(7))
    return request.param, weights_digest(whole)


@pytest.mark.parametrize("at", [0, 2, 3, 4])
def test_a_resumed_learner_ends_with_the_same_weights(
    tiny: Path, tmp_path: Path, uninterrupted: tuple[LoraSettings | None, str], at: int
) -> None:
    lora, expected = uninterrupted
    first = make(tiny, tmp_path, lora)
    learn(first, range(at))
    first.save_checkpoint("here")
    second = make(tiny, tmp_path, lora)
    learn(second, range(2))  # has a reference of its own, which the checkpoint's replaces
    second.load_checkpoint("here")
    learn(second, range(at, 7))
    assert weights_digest(second) == expected


def test_a_checkpoint_with_another_models_reference_is_refused(tiny: Path, tmp_path: Path) -> None:
    learner = make(tiny, tmp_path)
    learn(learner, range(1))
    name = next(iter(learner.model.moving_reference))
    del learner.model.moving_reference[name]
    learner.save_checkpoint("half")
    with pytest.raises(DomainError, match="the moving reference") as caught:
        make(tiny, tmp_path).load_checkpoint("half")
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH
