"""Which LoRA adapters are served: those that every backend computes as peft does. All others are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import WeightsKind
from mulligan.models import EMBEDDED
from mulligan.policy.adapter_config import AdapterConfig
from mulligan.policy.backend import WeightsFile
from mulligan.policy.backends._servers.skeleton import ADAPTER_FILE, Skeleton
from mulligan.policy.backends.transformers.model import Model
from mulligan.policy.backends.transformers.weights import Weights
from mulligan.testing.weights import load, plain_log_probs
from tests.support.settings import model_settings
from tests.support.tiny_model import VOCABULARY_SIZE, write_tiny_model

PROMPT = list(range(7, 47))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What LoraConfig is made with, on top of rank 4 on q_proj and v_proj.
ACCEPTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "another scale": {"lora_alpha": 3.5},
    "stabilised": {"use_rslora": True, "r": 6},
    "all linear layers": {"target_modules": "all-linear"},
    "a pattern of names": {"target_modules": r".*\.(q_proj|down_proj)"},
    "one layer of two": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "without some": {"target_modules": LINEAR, "exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"]},
    "ranks by name": {"target_modules": LINEAR, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}},
    "ranks by name, stabilised": {"rank_pattern": {"v_proj": 2}, "use_rslora": True},
    "dropout in training": {"lora_dropout": 0.3},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "nothing to begin with": {"init_lora_weights": False},
    "no task": {"task_type": None},
}
# What a file that peft could have written says instead.
REFUSED: dict[str, Any] = {
    "peft_type": ["IA3", "LOHA", "ADALORA", "lora", 7],
    "task_type": ["SEQ_CLS", "TOKEN_CLS"],
    "init_lora_weights": [
        "pissa",
        "pissa_niter_16",
        "olora",
        "corda",
        "loftq",
        "lora_ga",
        "mica",
        "from-the-future",
        1,
    ],
    "bias": ["all", "lora_only"],
    "use_rslora": ["yes", 1],
    "fan_in_fan_out": [True],
    "use_dora": [True],
    "lora_bias": [True],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "alpha_pattern": [{"q_proj": 3}],
    "modules_to_save": [["lm_head"]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [1]}],
    "target_parameters": [["mlp.experts.gate_up_proj"]],
    "layer_replication": [[[0, 2], [1, 3]]],
    "loftq_config": [{"loftq_bits": 4}],
    "corda_config": [{"corda_method": "kpm"}],
    "lora_ga_config": [{"direction": "ArB2r"}],
    "velora_config": [{"num_groups": 8}],
    "monteclora_config": [{"n": 2}],
    "kasa_config": [{"beta": 1e-4}],
    "arrow_config": [{"top_k": 3}],
    "alora_invocation_tokens": [[1, 2, 3]],
    "megatron_config": [{"tensor_model_parallel_size": 2}],
    "ensure_weight_tying": [True],
    "a_setting_of_the_future": [True, "on", 0.5, 16, [1], {"a": 1}],
    "r": [None, 0, -1, 4.5, "4", True],
    "lora_alpha": [None, "8", float("nan"), float("inf"), 10**400, True],
    "rank_pattern": [["q_proj"], {"q_proj": 0}, {"q_proj": "4"}],
    "target_modules": [7, [7], {"q_proj": True}],
    "layers_to_transform": ["0", ["0"]],
}
OFF: dict[str, Any] = {"a_setting_of_the_future": False, "another": None, "third": [], "fourth": {}, "fifth": ""}


def adapter(folder: Path, **settings: Any) -> Any:
    """Of the embedded model, with factors that all change something; saved by peft, and the model with it."""
    torch.manual_seed(0)
    plain: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    tuned = get_peft_model(load(EMBEDDED), LoraConfig(**(plain | settings)))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(str(folder))
    return tuned.eval()


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapter(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def engine() -> tuple[Model, Weights]:
    model = Model(model_settings(threads=1))
    return model, Weights(model.module, model.load_weights)


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    return Skeleton(str(EMBEDDED))


@pytest.fixture(scope="module")
def without() -> list[float]:
    """What the model computes without an adapter."""
    return plain_log_probs(load(EMBEDDED), PROMPT)


def merged(engine: tuple[Model, Weights], folder: Path) -> list[float]:
    """What the transformers backend computes with the adapter."""
    model, weights = engine
    file = WeightsFile(folder, WeightsKind.LORA, 1, "")
    weights.apply(weights.read(file), file.kind)
    [[row]] = list(model.score([PROMPT], 1.0))
    return list(row)


def by_sglang(found: tuple[dict[str, Any], dict[str, torch.Tensor]], folder: Path) -> list[float]:
    """What SGLang computes: lora_alpha / r, one rank, the layers whose names end as target_modules says."""
    model = load(EMBEDDED)
    config, completed = found
    tensors = completed or load_file(folder / ADAPTER_FILE)
    scale = config["lora_alpha"] / config["r"]
    for name, module in model.named_modules():
        key = f"base_model.model.{name}"
        if f"{key}.lora_A.weight" in tensors:
            assert name.rpartition(".")[2] in config["target_modules"]
            with torch.no_grad():
                module.weight.add_(scale * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"])
    return plain_log_probs(model, PROMPT)


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(DomainError) as caught:
        call()
    assert caught.value.reason is Reason.MODEL_MISMATCH, caught.value
    assert all(word in caught.value.message for word in words), caught.value.message


@pytest.mark.parametrize("name", list(ACCEPTED))
def test_what_is_accepted_is_computed_as_peft_does(
    name: str, tmp_path: Path, engine: Any, skeleton: Skeleton, without: list[float]
) -> None:
    adapter(tmp_path, **ACCEPTED[name])
    expected = plain_log_probs(PeftModel.from_pretrained(load(EMBEDDED), tmp_path).eval(), PROMPT)
    assert max(abs(a - b) for a, b in zip(expected, without, strict=True)) > 0.1
    assert merged(engine, tmp_path) == pytest.approx(expected, abs=2e-4)
    if "rank_pattern" in ACCEPTED[name]:
        refused(lambda: skeleton.check_adapter(tmp_path), "one rank for all layers")
    else:
        assert by_sglang(skeleton.check_adapter(tmp_path), tmp_path) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", list(REFUSED))
def test_every_other_setting_is_refused_by_its_name(name: str, folder: Path, engine: Any, skeleton: Skeleton) -> None:
    for value in REFUSED[name]:
        edit(folder, **{name: value})
        for call in (
            lambda: engine[1].read(WeightsFile(folder, WeightsKind.LORA, 1, "")),
            lambda: skeleton.check_adapter(folder),
        ):
            refused(call, "adapter_config.json", name)


def test_peft_has_no_setting_that_is_accepted_unseen(folder: Path) -> None:
    """Each is as it is by default, or one of those that were looked at."""
    written = json.loads((folder / "adapter_config.json").read_text())
    seen = {*written, *REFUSED, "runtime_config", "eva_config"}
    assert set(LoraConfig().to_dict()) <= seen
    for name in set(written) - set(REFUSED) - {"base_model_name_or_path", "auto_mapping", "revision", "peft_version"}:
        assert name in {"inference_mode", "lora_dropout", "megatron_core", "qalora_group_size"} | {
            "exclude_modules",
            "layers_pattern",
            "eva_config",
        }, name


def test_eva_is_read_with_what_it_was_made_by(folder: Path, engine: Any) -> None:
    before = merged(engine, folder)
    edit(
        folder, init_lora_weights="eva", eva_config={"rho": 2.0}, runtime_config={"ephemeral_gpu_offload": True}, **OFF
    )
    assert merged(engine, folder) == before


@given(st.text(), st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists))
def test_a_setting_that_nobody_knows_passes_where_it_is_off(name: str, value: Any) -> None:
    text = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, f"new_{name}": value}).encode()
    if value is None or value is False or value in ("", []):
        assert AdapterConfig.parse(text).rank == 4
    else:
        refused(lambda: AdapterConfig.parse(text), f"new_{name}")


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"null", b"[" * 100_000])
def test_what_is_no_configuration_is_refused(text: bytes) -> None:
    refused(lambda: AdapterConfig.parse(text), "adapter_config.json")


def test_the_file_s_tensors_are_those_of_the_configuration(folder: Path, engine: Any, skeleton: Skeleton) -> None:
    """peft leaves out what the configuration does not name, and refuses another rank."""
    cases = {
        "target_modules leaves out model.layers.0.self_attn.v_proj": {"target_modules": ["q_proj"]},
        "target_modules leaves out model.layers.0": {"layers_to_transform": [1]},
        "target_modules leaves out model.layers.1": {"exclude_modules": ["layers.1.self_attn.q_proj"]},
        "has rank 4, and adapter_config.json says r = 8": {"r": 8},
    }
    plain = json.loads((folder / "adapter_config.json").read_text())
    for words, changes in cases.items():
        edit(folder, **(plain | changes))
        refused(lambda: engine[1].read(WeightsFile(folder, WeightsKind.LORA, 1, "")), words)
        refused(lambda: skeleton.check_adapter(folder), words)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model.embed_tokens"], "model.embed_tokens is of the kind Embedding"),
        (["lm_head"], "lm_head is tied to model.embed_tokens"),
        (["model.layers.9.self_attn.q_proj"], "no place for"),
        (["model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.q_proj"], "twice"),
    ],
)
def test_adapters_of_other_than_linear_layers_are_refused(
    names: list[str], words: str, folder: Path, tmp_path: Path
) -> None:
    """Merged into a weight that two layers share, an adapter of the one would change the other, too."""
    tied = write_tiny_model(tmp_path / "tied")
    model = Model(model_settings(model=str(tied), threads=1))
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_A.weight"] = torch.ones(4, 16)
        tensors[f"{name}.lora_B.weight"] = torch.ones(16 if "layers" in name else VOCABULARY_SIZE, 4)
    save_file(tensors, folder / ADAPTER_FILE)
    edit(folder, target_modules=None)
    weights = Weights(model.module, model.load_weights)
    refused(lambda: weights.read(WeightsFile(folder, WeightsKind.LORA, 1, "")), words)
    refused(lambda: Skeleton(str(tied)).check_adapter(folder), words)


def test_an_adapter_whose_sum_is_no_number_is_refused(folder: Path, engine: Any) -> None:
    edit(folder, lora_alpha=1e300)
    refused(lambda: engine[1].read(WeightsFile(folder, WeightsKind.LORA, 1, "")), "not finite")
