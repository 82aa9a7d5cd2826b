"""Objectives that run the model more than once, on a real model: against single sequences in plain transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div, logsigmoid
from transformers import AutoModelForCausalLM

from mulligan.trainer.data import Datum
from mulligan.trainer.learner import model as model_module
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.objective import Tokens
from mulligan.trainer.objectives.divergence import Divergence
from mulligan.trainer.objectives.preference import Preference
from mulligan.trainer.settings import LoraSettings
from tests.support.learning import FULL, LORA, PLAIN, server_settings, spec
from tests.support.tiny_model import VOCABULARY_SIZE, write_tiny_model

Distributions = Sequence[tuple[torch.Tensor, torch.Tensor]]  # each: _NV of the model, and the trained tokens


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def sequence(rng: random.Random, answer: Sequence[int]) -> Tokens:
    """A random context, then the answer, which is trained."""
    context = [rng.randrange(VOCABULARY_SIZE) for _ in range(rng.randint(1, 20))]
    mask = (False,) * len(context) + (True,) * len(answer)
    return Tokens((*context, *answer), mask)


def data(kind: str, count: int = 6) -> list[Datum]:
    rng = random.Random(kind)
    found: list[Datum] = []
    for index in range(count):
        answers = [[rng.randrange(VOCABULARY_SIZE) for _ in range(rng.randint(1, 12))] for _ in range(2)]
        own = sequence(rng, answers[0])
        if kind == "preference":
            objective: Preference | Divergence = Preference(sequence(rng, answers[1]), 0.1 * (index + 1), 0.5)
        else:
            objective = Divergence(sequence(rng, answers[0]), [0.0, 1.0, 0.9][index % 3])
        found.append(Datum(f"d{index}", own.token_ids, own.loss_mask, 1 / count, 1.0 + index / 10, objective, "mine"))
    return found


def distributions(model: torch.nn.Module, tokens: Datum | Tokens, temperature: float) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([tokens.token_ids])).logits[0] / temperature
    places = [index - 1 for index, trained in enumerate(tokens.loss_mask) if trained]
    found: torch.Tensor = logits.log_softmax(-1)[places]
    return found


def total(log_probs: torch.Tensor, tokens: Datum | Tokens) -> torch.Tensor:
    targets = [token for token, trained in zip(tokens.token_ids, tokens.loss_mask, strict=True) if trained]
    return log_probs[range(len(targets)), targets].sum()


def expected_loss(model: torch.nn.Module, reference: torch.nn.Module, datum: Datum) -> torch.Tensor:
    objective = datum.objective
    own = distributions(model, datum, datum.temperature)
    if isinstance(objective, Divergence):
        teacher = distributions(model, objective.teacher, datum.temperature).detach()
        pairs = [(own, teacher, 1.0)]
        if objective.beta == 1:
            pairs = [(teacher, own, 1.0)]
        elif objective.beta:
            mixture = (objective.beta * teacher.exp() + (1 - objective.beta) * own.exp()).log()
            pairs = [(mixture, teacher, objective.beta), (mixture, own, 1 - objective.beta)]
        parts = [share * kl_div(to, of, reduction="sum", log_target=True) for to, of, share in pairs]
        return torch.stack(parts).sum()
    assert isinstance(objective, Preference)
    ratios = []
    for tokens in (datum, objective.rejected):
        with torch.no_grad():
            before = total(distributions(reference, tokens, datum.temperature), tokens)
        ratios.append(total(distributions(model, tokens, datum.temperature), tokens) - before)
    supervised = -total(own, datum) / sum(datum.loss_mask)
    return -logsigmoid(objective.beta * (ratios[0] - ratios[1])) + objective.ftx * supervised


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in learner.model.trainable.items() if parameter.grad is not None}


@pytest.mark.parametrize("microbatch_tokens", [10_000, 60])
@pytest.mark.parametrize("kind", ["preference", "divergence"])
def test_loss_and_gradient_are_those_of_single_sequences(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, microbatch_tokens: int
) -> None:
    if microbatch_tokens < 1000:
        monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", 10 * VOCABULARY_SIZE)  # pieces of five or ten tokens
    learner = Learner("learner", spec(tiny), server_settings(tmp_path, microbatch_tokens=microbatch_tokens))
    learner.forward_backward(data("preference", 3), PLAIN)
    learner.optim_step()  # the model is no longer its reference
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.load_state_dict(learner.model.base.state_dict())
    batch = data(kind)
    losses = [datum.weight * expected_loss(model, reference, datum) for datum in batch]
    torch.stack(losses).sum().backward()
    metrics = learner.forward_backward(batch, PLAIN)
    assert metrics["mine/loss"] == pytest.approx(sum(loss.item() for loss in losses), rel=1e-4)
    assert metrics["tokens"] == sum(sum(datum.loss_mask) for datum in batch)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, found in gradients(learner).items():
        wanted = expected[name]
        assert wanted is not None and torch.allclose(found, wanted, atol=2e-5), name


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_a_divergence_between_equal_contexts_has_no_gradient(
    tiny: Path, tmp_path: Path, lora: LoraSettings | None
) -> None:
    learner = Learner("learner", spec(tiny, lora), server_settings(tmp_path))
    same = [
        replace(datum, objective=Divergence(Tokens(datum.token_ids, datum.loss_mask), beta))
        for datum, beta in zip(data("divergence", 3), (0.0, 1.0, 0.9), strict=True)
    ]
    metrics = learner.forward_backward(same, PLAIN)
    assert metrics["loss"] == pytest.approx(0.0, abs=1e-5)
    assert max(gradient.abs().max() for gradient in gradients(learner).values()) < 1e-6
    learner.forward_backward(data("divergence", 3), PLAIN)
    assert max(gradient.abs().max() for gradient in gradients(learner).values()) > 1e-3


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_what_is_preferred_becomes_likelier_and_what_is_rejected_rarer(
    tiny: Path, tmp_path: Path, lora: LoraSettings | None
) -> None:
    learner = Learner("learner", spec(tiny, lora), server_settings(tmp_path))
    batch = [replace(datum, weight=1.0) for datum in data("preference")]
    before = learner.forward_backward(batch, PLAIN)
    assert before["margin"] == pytest.approx(0.0, abs=1e-5), "the model is its own reference"
    learner.optim_step()
    for _ in range(3):
        learner.forward_backward(batch, PLAIN)
        learner.optim_step()
    after = learner.forward_backward(batch, PLAIN)
    assert after["margin"] > 0 and after["accuracy"] == 1.0 and after["loss"] < before["loss"]


def test_the_caller_may_give_the_reference(tiny: Path, tmp_path: Path) -> None:
    """Then the learner loads no reference model, and the loss is the same as with its own."""
    one, other = (Learner("learner", spec(tiny), server_settings(tmp_path)) for _ in range(2))
    batch = data("preference")
    given: list[Datum] = []
    for datum in batch:
        objective = datum.objective
        assert isinstance(objective, Preference)
        rejected = Datum(
            "", objective.rejected.token_ids, objective.rejected.loss_mask, 1.0, datum.temperature, objective, ""
        )
        own_log_probs, rejected_log_probs = other.forward([datum, rejected])
        with_log_probs = replace(objective.rejected, log_probs=rejected_log_probs)
        changed = replace(objective, rejected=with_log_probs, reference_log_probs=own_log_probs)
        given.append(replace(datum, objective=changed))
    expected = one.forward_backward(batch, PLAIN)
    assert other.forward_backward(given, PLAIN)["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert one.model._reference is not None and other.model._reference is None
