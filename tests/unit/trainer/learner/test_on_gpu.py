"""The learner on a CUDA device: what it computes there is what the CPU computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import LoraSettings, OptimizerSettings
from tests.support.learning import FULL, LORA, PLAIN, many, server_settings, spec
from tests.support.tiny_model import VOCABULARY_SIZE, write_square_model, write_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ALL_TERMS = ppo.Settings(kl_coefficient=0.1, entropy_coefficient=0.01)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FlexAttention on CUDA wants heads of at least 16."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), head_dim=32)


def gradients(learner: Learner) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in learner.model.trainable.items()}
    return {name: gradient.cpu() for name, gradient in found.items() if gradient is not None}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients together, relative in the Euclidean norm."""
    assert found.keys() == expected.keys()
    gap = sum(float((found[name] - expected[name]).double().square().sum()) for name in found)
    return float((gap / sum(float(each.double().square().sum()) for each in expected.values())) ** 0.5)


def learner_on(device: str, model: Path, folder: Path, lora: LoraSettings | None = FULL, **server: Any) -> Learner:
    server = {"microbatch_tokens": 150} | server
    return Learner(device, spec(model, lora), server_settings(folder, device=device, **server))


def moved(learner: Learner) -> Learner:
    """After an optimizer step: LoRA's second matrix is no longer 0, nor the model its reference."""
    learner.forward_backward(many(20, seed=1), PLAIN)
    learner.optim_step()
    return learner


def give_weights(learner: Learner, others: Learner) -> None:
    for name, parameter in learner.model.trainable.items():
        parameter.data.copy_(others.model.trainable[name].data)


@pytest.mark.parametrize(("attention", "checkpointing"), [("sdpa", True), ("flex", False), ("flex", True)])
@pytest.mark.parametrize("lora", [FULL, LORA])
def test_gradients_are_those_of_the_cpu(
    tiny: Path, tmp_path: Path, lora: LoraSettings | None, attention: str, checkpointing: bool
) -> None:
    """In float32, of all losses and terms, in several micro-batches of different sizes."""
    server = {"gradient_checkpointing": checkpointing}
    on_cpu = moved(learner_on("cpu", tiny, tmp_path, lora, attention="sdpa", **server))
    on_gpu = learner_on("cuda", tiny, tmp_path, lora, attention=attention, **server)
    assert on_gpu.model.shares_prefixes
    give_weights(on_gpu, on_cpu)
    metrics, expected = (learner.forward_backward(many(30), ALL_TERMS) for learner in (on_gpu, on_cpu))
    assert difference(gradients(on_gpu), gradients(on_cpu)) < 1e-4
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_bfloat16_errs_by_as_much_with_shared_prefixes_as_without(tiny: Path, tmp_path: Path) -> None:
    """FlexAttention, and rows of separate sequences, against the CPU's gradient in float32."""
    expected = learner_on("cpu", tiny, tmp_path)
    expected.forward_backward(many(30), PLAIN)
    errors = {}
    for sharing in (True, False):
        settings = spec(tiny)
        settings = replace(settings, model=settings.model.model_copy(update={"dtype": "bfloat16"}))
        learner = Learner(f"sharing-{sharing}", settings, server_settings(tmp_path, device="cuda"))
        assert learner.model._tree_kernel == "flex"
        learner.model.shares_prefixes = sharing
        learner.forward_backward(many(30), PLAIN)
        errors[sharing] = difference(gradients(learner), gradients(expected))
    assert errors[True] < 1.5 * errors[False] < 0.3


def test_training_goes_on_from_a_checkpoint_as_it_would_have(tiny: Path, tmp_path: Path) -> None:
    settings = server_settings(tmp_path, device="cuda")
    learner = Learner("learner", spec(tiny, deterministic=True), settings)
    learner.forward_backward(many(10), PLAIN)
    learner.optim_step()
    learner.save_checkpoint("one")
    other = Learner("learner", spec(tiny, deterministic=True), settings)
    other.load_checkpoint("one")
    for each in (learner, other):
        each.forward_backward(many(10, seed=2), PLAIN)
        each.optim_step()
    for name, parameter in learner.model.trainable.items():
        assert torch.equal(parameter, other.model.trainable[name])


def test_moments_of_8_bits_step_nearly_as_float32(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="needs the extra adam8bit")
    square = write_square_model(tmp_path / "square", vocabulary=VOCABULARY_SIZE)
    found = []
    for moments in ("8bit", "float32"):
        settings = replace(spec(square), optimizer=OptimizerSettings(learning_rate=1e-3, moments=moments))
        learner = Learner(moments, settings, server_settings(tmp_path, device="cuda"))
        for step in range(3):
            learner.forward_backward(many(10, seed=step), PLAIN)
            learner.optim_step()
        found.append({name: parameter.detach().cpu() for name, parameter in learner.model.trainable.items()})
    assert difference(*found) < 0.01


def test_published_weights_have_their_probes(tiny: Path, tmp_path: Path) -> None:
    """They are written from the GPU, and hold what the learner has."""
    learner = Learner("learner", spec(tiny), server_settings(tmp_path, device="cuda"))
    learner.forward_backward(many(10), PLAIN)
    learner.optim_step()
    published = learner.publish_weights(1)
    again = Learner("again", spec(tiny), server_settings(tmp_path, device="cpu"))
    for name, tensor in load_file(url2pathname(urlparse(published.uri).path)).items():
        again.model.trainable[name].data.copy_(tensor)
    for one, other in zip(published.canary, again.model.probes(), strict=True):
        assert one.token_ids == other.token_ids
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-3)
