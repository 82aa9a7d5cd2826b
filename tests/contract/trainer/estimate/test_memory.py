"""The estimated memory of a learner, compared with the bytes of the tensors of a real one, and with figures that others
published."""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mulligan.common.errors import DomainError
from mulligan.trainer.estimate import memory as memory_module
from mulligan.trainer.estimate.memory import Reference, Training, memory
from mulligan.trainer.estimate.shapes import KNOWN, shape_from, shape_of
from mulligan.trainer.learner import model as model_module
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.settings import LearnerSpec
from mulligan.trainer.loss_terms import KlReference
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import LoraSettings, OptimizerSettings, RunSettings, TrainedModelSettings
from tests.support.learning import PLAIN, sampled, server_settings
from tests.support.tensor_bytes import TensorBytes
from tests.support.tiny_model import VOCABULARY_SIZE, write_model

GIB = 2**30
# Each two values of rank, type and checkpointing together.
EACH_PAIR = [(0, "float32", False), (0, "bfloat16", True), (8, "float32", True), (8, "bfloat16", False)]
THE_OTHERS = [(rank, dtype, not checkpointing) for rank, dtype, checkpointing in EACH_PAIR]
SIZES: dict[str, Any] = {"max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def qwen3() -> PreTrainedModel:
    """Its head is small beside its layers."""
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        **SIZES,
    )
    return Qwen3ForCausalLM(config)


def llama() -> PreTrainedModel:
    """Its head is large."""
    config = LlamaConfig(
        vocab_size=5000,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        **SIZES,
    )
    return LlamaForCausalLM(config)


def olmo3() -> PreTrainedModel:
    """Three of its layers have a window, so its attention has masks."""
    config = Olmo3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        sliding_window=64,
        **SIZES,
    )
    return Olmo3ForCausalLM(config)


@pytest.fixture(scope="module", params=[qwen3, llama, olmo3], ids=lambda make: make.__name__)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(request.param(), tmp_path_factory.mktemp("model"))


def bytes_of_a_step(
    folder: Path, tokens: int, rank: int, dtype: str, checkpointing: bool, loss: ppo.Settings = PLAIN
) -> tuple[int, int]:
    """What a learner keeps between two micro-batches, and the most that a second one adds."""
    lora = LoraSettings(rank=rank) if rank else None
    model = TrainedModelSettings.model_validate({"source": str(folder), "lora": lora, "dtype": dtype})
    server = server_settings(folder, microbatch_tokens=tokens, gradient_checkpointing=checkpointing)
    ids = [place % VOCABULARY_SIZE for place in range(tokens + 1)]
    data = [sampled(tokens=ids, trained=range(1, tokens + 1), rollout=[-3.0] * tokens)]
    with TensorBytes() as counted:
        learner = Learner("learner", LearnerSpec(model, OptimizerSettings()), server)
        learner.forward_backward(data, loss)
        learner.optim_step()
        learner.forward_backward(data, loss)
        gc.collect()
        kept = counted.restart()
        learner.forward_backward(data, loss)
    return kept, counted.peak - kept


@pytest.mark.parametrize(
    ("rank", "dtype", "checkpointing"),
    [*EACH_PAIR, *(pytest.param(*values, marks=pytest.mark.long) for values in THE_OTHERS)],
)
def test_the_estimate_is_that_of_a_real_learner(folder: Path, rank: int, dtype: str, checkpointing: bool) -> None:
    tokens = 512
    kept, added = bytes_of_a_step(folder, tokens, rank, dtype, checkpointing)
    training = Training(rank=rank, number=2 if dtype == "bfloat16" else 4)
    found = memory(shape_of(str(folder))[0], training, tokens, checkpointing=checkpointing, on_gpu=False)
    assert kept == pytest.approx(found.kept, abs=8192), "weights, gradients and moments to the byte, but for counters"
    assert 0.97 <= (found.total - found.kept) / added <= 1.2


def test_no_copy_of_all_weights_is_made_in_another_type(tmp_path: Path) -> None:
    write_model(qwen3(), tmp_path)
    shape, _ = shape_of(str(tmp_path))
    _, added = bytes_of_a_step(tmp_path, 4, 0, "bfloat16", checkpointing=True)
    found = memory(shape, Training(), 4, checkpointing=True, on_gpu=False)
    assert found.copies == 0 and added < 2 * shape.layers * shape.layer_matrices
    assert 0.97 <= (found.total - found.kept) / added <= 1.2


@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.1])
def test_the_head_is_computed_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entropy_coefficient: float
) -> None:
    write_model(llama(), tmp_path)
    for module in (model_module, memory_module):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", 128 * 5000)
    loss = ppo.Settings(kl_coefficient=0.0, entropy_coefficient=entropy_coefficient)
    _, added = bytes_of_a_step(tmp_path, 512, 8, "float32", checkpointing=True, loss=loss)
    training = Training(rank=8, number=4, entropy_gradient=entropy_coefficient > 0)
    found = memory(shape_of(str(tmp_path))[0], training, 512, checkpointing=True, on_gpu=False)
    assert 0.97 <= (found.total - found.kept) / added <= 1.2


def test_the_reference_of_the_kl_is_counted(tmp_path: Path) -> None:
    write_model(qwen3(), tmp_path)
    shape, _ = shape_of(str(tmp_path))
    kept, added = bytes_of_a_step(tmp_path, 256, 0, "float32", checkpointing=False, loss=ppo.Settings())
    training = Training(number=4, has_kl=True, reference=Reference.MODEL)
    found = memory(shape, training, 256, on_gpu=False)
    assert found.reference == 4 * shape.parameters
    assert kept == pytest.approx(found.kept, abs=8192)
    assert 0.97 <= (found.total - found.kept) / added <= 1.2


def test_several_gpus_share_what_is_kept_and_nothing_else() -> None:
    shape = shape_from(KNOWN["Qwen/Qwen3-4B"])
    one, eight = (memory(shape, Training(), 4096, gpus=gpus, checkpointing=True) for gpus in (1, 8))
    assert one.kept == 16 * shape.parameters and eight.kept == pytest.approx(one.kept / 8)
    assert one.gathered == 0 < eight.gathered
    assert (one.activations, one.head, one.layer) == (eight.activations, eight.head, eight.layer)
    lora = memory(shape, Training(rank=16), 4096)
    assert lora.weights == 2 * shape.parameters + 4 * Training(rank=16).adapter_parameters(shape)


# https://github.com/PrimeIntellect-ai/prime-rl/tree/main/benchmarks: H100, recomputation, float32 weights beside LoRA
@pytest.mark.parametrize(
    ("model", "tokens", "gpus", "published"),
    [
        ("Qwen/Qwen3-4B-Instruct-2507", 16_384, 1, 23.3),
        ("Qwen/Qwen3-4B-Instruct-2507", 65_536, 1, 42.0),
        ("Qwen/Qwen3-4B-Instruct-2507", 16_384, 8, 10.3),
        ("Qwen/Qwen3-4B-Instruct-2507", 65_536, 8, 28.8),
        ("Qwen/Qwen3-0.6B", 16_384, 1, 5.1),
        ("Qwen/Qwen3-0.6B", 65_536, 1, 11.5),
        ("allenai/Olmo-3-7B-Instruct", 16_384, 1, 39.25),
    ],
)
def test_published_peaks_of_lora_are_met_within_a_tenth(model: str, tokens: int, gpus: int, published: float) -> None:
    shape = shape_from(KNOWN[model])
    found = memory(shape, Training(rank=16), tokens, gpus=gpus, checkpointing=True)
    of_float32 = 2 * shape.parameters / gpus  # bytes that bfloat16 saves here
    assert (found.total + of_float32) / GIB == pytest.approx(published, rel=0.1)


def test_what_is_trained_is_read_from_the_settings_of_a_run() -> None:
    shape = shape_from(KNOWN["Qwen/Qwen3-4B"])

    def training(**changes: object) -> Training:
        return Training.of(RunSettings.model_validate({"environment": "game", **changes}), shape)

    assert training() == Training(number=4, has_kl=True, reference=Reference.MODEL)
    assert training(loss={"kl_coefficient": 0, "entropy_coefficient": 0.1}) == Training(number=4, entropy_gradient=True)
    assert training(loss={"kl_reference": "moving"}).reference is Reference.TRAINED
    eight_bits = training(optimizer={"moments": "8bit"})
    assert memory(shape, eight_bits, 1).moments == 2 * (shape.parameters + 4 * shape.parameters / 256)
    lora = {"rank": 4, "target_modules": ["self_attn.q_proj", "down_proj"]}
    found = training(model={"lora": lora, "dtype": "bfloat16"})
    names = [name for layer in range(36) for name in (f"{layer}.self_attn.q_proj", f"{layer}.mlp.down_proj")]
    adapted = tuple(f"model.layers.{name}" for name in names)
    assert found == Training(rank=4, adapted=adapted, has_kl=True)
    # q: 2560 → 4096; down: 9728 → 2560
    assert found.adapter_parameters(shape) == 36 * 4 * ((2560 + 4096) + (9728 + 2560))


def adapted(targets: Sequence[str], **optimizer: str) -> RunSettings:
    lora = {"rank": 4, "target_modules": targets}
    return RunSettings.model_validate({"environment": "game", "model": {"lora": lora}, "optimizer": optimizer})


@pytest.mark.parametrize(
    "targets",
    [
        [],
        ["q_proj", "q_proj"],
        ["q_proj", "self_attn.q_proj", "down_proj"],
        ["layers.2.self_attn.q_proj"],
        ["model.layers.0.mlp.up_proj", "model.layers.3.mlp.up_proj", "v_proj"],
        ["0.self_attn.o_proj", "layers.0.self_attn.o_proj"],
    ],
)
def test_adapters_are_counted_where_peft_puts_them(tmp_path: Path, targets: list[str]) -> None:
    write_model(qwen3(), tmp_path)
    settings = adapted(targets)
    model = settings.model.model_copy(update={"source": str(tmp_path)})
    learner = Learner("learner", LearnerSpec(model, OptimizerSettings()), server_settings(tmp_path))
    shape, _ = shape_of(str(tmp_path))
    assert Training.of(settings, shape).trained_parameters(shape) == learner.trainable_parameter_count


@pytest.mark.parametrize(
    ("target", "near"),
    [
        ("qproj", "'q_proj'"),
        ("attn.q_proj", ""),
        ("model.layers.36.mlp.up_proj", r"'model\.layers\.\d+\.mlp\.up_proj'"),
        ("self_attn", ""),
    ],
)
def test_adapters_of_unknown_layers_are_refused(target: str, near: str) -> None:
    said = rf"model\.lora\.target_modules.*got '{re.escape(target)}'.*{near}"
    with pytest.raises(DomainError, match=said):
        Training.of(adapted(["k_proj", target]), shape_from(KNOWN["Qwen/Qwen3-4B"]))


MOVING = ppo.Settings(kl_coefficient=0.1, kl_reference=KlReference.MOVING)


@pytest.mark.timeout(600)  # moments of 8 bits are compiled
@pytest.mark.parametrize(
    ("moments", "rank", "loss", "each"),
    [
        ("float32", 0, PLAIN, 12),
        ("float32", 0, MOVING, 16),
        ("float32", 8, PLAIN, 12),
        ("float32", 8, MOVING, 16),
        pytest.param("8bit", 0, PLAIN, 6, marks=pytest.mark.long),
        pytest.param("8bit", 0, MOVING, 10, marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_has_the_estimated_size(
    tmp_path: Path, moments: str, rank: int, loss: ppo.Settings, each: int
) -> None:
    """The numbers in its tensors, within 1%: with 8 bits, blocks are shorter than in large models, and have a scale
    each; norms stay float32."""
    if moments == "8bit":
        pytest.importorskip("torchao", reason="needs the extra adam8bit")
    write_model(qwen3(), tmp_path)
    settings = RunSettings.model_validate(
        {
            "environment": "game",
            "model": {"source": str(tmp_path), "lora": {"rank": rank} if rank else None},
            "optimizer": {"moments": moments},
            "loss": {"kl_coefficient": loss.kl_coefficient, "kl_reference": loss.kl_reference},
        }
    )
    learner = Learner("learner", LearnerSpec(settings.model, settings.optimizer), server_settings(tmp_path))
    learner.forward_backward([sampled(tokens=[2, 3, 4], trained=[1, 2], rollout=[-3.0] * 2)], loss)
    learner.optim_step()
    learner.save_checkpoint("one")
    files = (learner.server.checkpoint_folder / "learner" / "one").glob("*.safetensors")
    parts = [load_file(file) for file in files if not file.name.startswith("random")]
    size = sum(tensor.nbytes for part in parts for tensor in part.values())
    shape, _ = shape_of(str(tmp_path))
    found = Training.of(settings, shape).checkpoint_bytes(shape)
    assert size == pytest.approx(found, rel=0.01)
    assert found / learner.trainable_parameter_count == pytest.approx(each, rel=0.01)
