"""What a learner holds in memory: peaks of processes of their own, and gradient checkpointing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import LoraSettings
from tests.support.learning import FULL, LORA, many, sampled, server_settings, spec
from tests.support.tiny_model import CONTEXT_LENGTH, VOCABULARY_SIZE, write_tiny_model

LARGE_VOCABULARY = 151_936  # of Qwen3
TOKENS = 1500
WHOLE_LOGITS = TOKENS * LARGE_VOCABULARY * 4
# Prints by how many bytes a step raises the largest memory that the process had so far.
STEP = """
import resource, sys
from pathlib import Path
import torch
from mulligan.trainer.learner.allocator import return_freed_memory
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import LoraSettings
from tests.support.learning import sampled, server_settings, spec

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

return_freed_memory()
tokens = int(sys.argv[2])
folder = Path(sys.argv[1])
learner = Learner("learner", spec(folder, LoraSettings(rank=1)), server_settings(folder, microbatch_tokens=tokens))
places = range(1, tokens + 1)
datum = sampled(tokens=[place % 1000 for place in range(tokens + 1)], trained=places, rollout=[-9.0] * tokens)
learner.forward_backward([sampled(tokens=datum.token_ids[:10], trained=(9,), rollout=(-9.0,))], ppo.Settings())
before = peak()
learner.forward_backward([datum], ppo.Settings(kl_coefficient=0.1, entropy_coefficient=0.1))
print(peak() - before)
"""


def write_model(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(write_tiny_model(folder / "tiny") / name, folder / name)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage counts kilobytes on Linux only")
def test_the_head_never_holds_all_tokens_times_a_large_vocabulary(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=LARGE_VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=TOKENS + 1,
    )
    folder = write_model(LlamaForCausalLM(config), tmp_path)
    arguments = [sys.executable, "-c", STEP, str(folder), str(TOKENS)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 2 * WHOLE_LOGITS, "all at once take six times the logits"


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
