"""Gradient checkpointing: the same gradients from less that is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import LoraSettings
from tests.support.learning import FULL, LORA, many, sampled, server_settings, spec
from tests.support.tiny_model import CONTEXT_LENGTH, VOCABULARY_SIZE, write_model, write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), layers=3)


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_checkpointed_activations_give_the_same_gradient(tiny: Path, tmp_path: Path, lora: LoraSettings | None) -> None:
    found: list[tuple[dict[str, float], list[Tensor | None]]] = []
    kept: list[int] = []  # bytes, of what is kept for the backward pass
    for checkpointing in (False, True):
        learner = Learner("learner", spec(tiny, lora), server_settings(tmp_path, gradient_checkpointing=checkpointing))
        kept.append(0)

        def keep(tensor: Tensor) -> Tensor:
            kept[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            metrics = learner.forward_backward(many(20), ppo.Settings(kl_coefficient=0.1))
        found.append((metrics, [parameter.grad for parameter in learner.model.trainable.values()]))
    assert kept[1] < kept[0] / 3
    (metrics, gradients), (checkpointed_metrics, checkpointed) = found
    assert checkpointed_metrics == metrics
    for gradient, other in zip(gradients, checkpointed, strict=True):
        assert gradient is not None and other is not None and torch.equal(gradient, other)


def test_checkpointing_leaves_dropout_off(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCABULARY_SIZE, n_positions=CONTEXT_LENGTH, n_embd=16, n_layer=2, n_head=2)
    assert config.resid_pdrop > 0 and config.attn_pdrop > 0
    folder = write_model(GPT2LMHeadModel(config), tmp_path)
    plain, checkpointed = (
        Learner("learner", spec(folder), server_settings(folder, gradient_checkpointing=value))
        for value in (False, True)
    )
    assert checkpointed.forward([sampled()]) == plain.forward([sampled()])


def test_layers_that_drop_out_themselves_are_refused(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        dropout=0.5,
    )
    folder = write_model(OPTForCausalLM(config), tmp_path)
    with pytest.raises(DomainError, match="opt: its layers compute something else in training mode") as caught:
        Learner("learner", spec(folder), server_settings(folder, gradient_checkpointing=True))
    assert caught.value.reason is Reason.UNSUPPORTED_MODEL
