"""The transformers backend as one of the backends: its weights, their checksum, and what it leaves behind."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mulligan import models
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, SamplingParams, VersionSpan, WeightsKind
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy.backend import Ask, Replica, WeightsFile
from mulligan.policy.backends.transformers import open as open_backend
from mulligan.policy.backends.transformers.backend import TransformersBackend
from mulligan.policy.backends.transformers.model import Model
from mulligan.policy.backends.transformers.weights import Weights
from tests.support.effort import examples
from tests.support.settings import model_settings

SETTINGS = model_settings(threads=1, cache_gib=0.1)
ORIGINAL = WeightsFile(None, WeightsKind.ORIGINAL, 0, "")
PROMPT = Ask([10, 11, 12], SamplingParams(max_tokens=8, temperature=0.0))


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[TransformersBackend]:
    opened = await open_backend(SETTINGS, tmp_path, 3)
    assert isinstance(opened, TransformersBackend)
    yield opened
    await opened.close()


async def pass_all(replica: Replica, weights: WeightsFile) -> None:
    pass


def full(path: Path, version: int, change: dict[str, float]) -> WeightsFile:
    tensors = load_file(models.EMBEDDED / "model.safetensors")
    save_file({name: tensor.float() + change.get(name, 0.0) for name, tensor in tensors.items()}, path)
    return WeightsFile(path, WeightsKind.FULL, version, "")


def adapter(path: Path, version: int) -> WeightsFile:
    size = json.loads((models.EMBEDDED / "config.json").read_text())["hidden_size"]
    path.mkdir()
    torch.manual_seed(0)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    rows = load_file(models.EMBEDDED / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].shape[0]
    factors = {f"{key}.lora_A.weight": torch.randn(4, size), f"{key}.lora_B.weight": torch.randn(rows, 4)}
    save_file(factors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 4}))
    return WeightsFile(path, WeightsKind.LORA, version, "")


async def test_it_begins_with_the_version_that_it_is_told_and_says_what_it_can(backend: TransformersBackend) -> None:
    assert backend.policy_version == 3
    sampled = await backend.generate(PROMPT)
    assert sampled.policy_versions == (VersionSpan(3, len(sampled.token_ids)),)
    assert backend.model.dtype == "float32" and backend.model.adapters == ()
    absent = {Feature.REGEX, Feature.JSON_SCHEMA, Feature.TOOLS, Feature.MEMORY_RELEASE}
    assert set(Feature) - backend.model.features == absent
    for call in (backend.release_memory, backend.resume_memory):
        with pytest.raises(DomainError) as caught:
            await call()
        assert caught.value.reason is Reason.UNSUPPORTED_OPTION


async def test_fixed_adapters_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="adapters"):
        await open_backend(SETTINGS.model_copy(update={"adapters": {"pirate": "x"}}), tmp_path, 0)


@pytest.fixture(scope="module")
def loaded() -> tuple[Model, Weights]:
    model = Model(SETTINGS)
    return model, Weights(model.module, model.load_weights)


def checksum(weights: Weights) -> str:
    return list(weights.checksum())[-1]


@settings(max_examples=examples(40))
@given(data=st.data())
def test_the_checksum_notices_the_smallest_change_of_any_weight(data: st.DataObject, loaded: Any) -> None:
    model, weights = loaded
    before = checksum(weights)
    tensors = dict(model.module.named_parameters())
    flat = tensors[data.draw(st.sampled_from(sorted(tensors)))].detach().reshape(-1)
    index = data.draw(st.integers(0, len(flat) - 1))
    value = flat[index].clone()
    flat[index] = torch.nextafter(value, torch.tensor(torch.inf))
    assert checksum(weights) != before
    flat[index] = value
    assert checksum(weights) == before


def test_the_checksum_notices_tensors_that_changed_places_and_ones_that_were_replaced(loaded: Any) -> None:
    model, weights = loaded
    before = checksum(weights)
    first, second = (model.module.model.layers[index].mlp for index in (0, 1))
    first.up_proj.weight, second.up_proj.weight = second.up_proj.weight, first.up_proj.weight
    assert checksum(weights) != before
    first.up_proj.weight, second.up_proj.weight = second.up_proj.weight, first.up_proj.weight
    assert checksum(weights) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_after_any_updates_the_weights_that_the_model_came_with_come_back_exactly(
    dtype: str, tmp_path: Path
) -> None:
    backend = await open_backend(SETTINGS.model_copy(update={"dtype": dtype}), tmp_path, 0)
    replica = backend.replicas[0]
    before = await replica.checksum()
    answer = await backend.generate(PROMPT)
    seen = {before}
    for version, weights in enumerate(
        [
            full(tmp_path / "one", 1, {"model.norm.weight": 1.0}),
            adapter(tmp_path / "two", 2),
            full(tmp_path / "three", 3, {"model.embed_tokens.weight": 0.5}),
        ],
        start=1,
    ):
        await backend.update_weights(weights, pass_all)
        assert backend.policy_version == version
        seen.add(await replica.checksum())
        await backend.update_weights(ORIGINAL, pass_all)
        assert await replica.checksum() == before
    again = await backend.generate(PROMPT)
    assert (again.token_ids, again.log_probs) == (answer.token_ids, answer.log_probs)
    assert len(seen) == 4
    await backend.close()


async def test_nobody_is_served_by_weights_that_are_being_checked(backend: TransformersBackend, tmp_path: Path) -> None:
    replica = backend.replicas[0]
    sequences = [[10, 11, 12, 13]]
    before = await replica.score(sequences, 1.0)
    old = await replica.checksum()
    waiting: list[asyncio.Task[Any]] = []

    async def admit(checked: Replica, weights: WeightsFile) -> None:
        waiting.append(asyncio.create_task(backend.generate(PROMPT)))
        waiting.append(asyncio.create_task(backend.score(sequences, 1.0)))
        scored = await checked.score(sequences, 1.0)
        assert scored.policy_version == weights.policy_version == backend.policy_version
        assert scored.log_probs != before.log_probs and await checked.checksum() != old
        assert not any(task.done() for task in waiting)

    await backend.update_weights(full(tmp_path / "file", 4, {"model.norm.weight": 1.0}), admit)
    sampled, scored = await asyncio.gather(*waiting)
    assert {span.policy_version for span in sampled.policy_versions} == {scored.policy_version} == {4}


async def test_what_the_check_raises_reaches_the_caller_who_then_loads_others(
    backend: TransformersBackend, tmp_path: Path
) -> None:
    before = await backend.replicas[0].checksum()

    async def refuse(replica: Replica, weights: WeightsFile) -> None:
        raise DomainError(Reason.CANARY_FAILED, "planned")

    with pytest.raises(DomainError, match="planned"):
        await backend.update_weights(full(tmp_path / "file", 4, {"model.norm.weight": 1.0}), refuse)
    await backend.update_weights(ORIGINAL, pass_all)
    assert await backend.replicas[0].checksum() == before
    assert (await backend.generate(PROMPT)).policy_versions[0].policy_version == 0


async def test_a_file_that_does_not_fit_changes_nothing(backend: TransformersBackend, tmp_path: Path) -> None:
    before = await backend.replicas[0].checksum()
    file = full(tmp_path / "file", 4, {})
    tensors = load_file(tmp_path / "file")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "file")
    for weights, reason in (
        (file, Reason.MODEL_MISMATCH),
        (WeightsFile(tmp_path / "nowhere", WeightsKind.FULL, 4, ""), Reason.WEIGHTS_NOT_FOUND),
    ):
        with pytest.raises(DomainError) as caught:
            await backend.update_weights(weights, pass_all)
        assert caught.value.reason is reason
    assert backend.policy_version == 3 and await backend.replicas[0].checksum() == before


async def test_closing_frees_the_memory_whoever_holds_the_backend(tmp_path: Path) -> None:
    before = tensor_bytes()
    backend = await open_backend(SETTINGS, tmp_path, 0)
    cache = tensor_bytes() - before - (models.EMBEDDED / "model.safetensors").stat().st_size
    await backend.update_weights(adapter(tmp_path / "adapter", 1), pass_all)
    assert cache > 0.09 * 2**30 and tensor_bytes() > before + cache
    await backend.close()
    assert tensor_bytes() == before
    with pytest.raises(DomainError) as caught:
        await backend.generate(PROMPT)
    assert caught.value.reason is Reason.ENGINE_UNAVAILABLE


def tensor_bytes() -> int:
    """Of the storages of all tensors that live on the CPU."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    storages = {
        item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()
        for item in tensors
        if item.device.type == "cpu"
    }
    return sum(storages.values())
