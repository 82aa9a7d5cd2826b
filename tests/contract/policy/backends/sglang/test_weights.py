"""New weights for a real SGLang server that is busy, and what it must never serve."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import LoraLimits, PolicyInfo, WeightsKind
from mulligan.policy.backend import Sampled, WeightsFile
from mulligan.testing.weights import load
from mulligan.trainer.preflight import check_actor
from mulligan.trainer.settings import LoraSettings, RunSettings, TrainedModelSettings
from tests.support.found import sglang_address
from tests.support.sglang import (
    ATTENTION,
    MODEL,
    Load,
    admission,
    ask,
    assert_by_version,
    changed,
    control,
    full,
    loaded_adapters,
    lora,
    opened,
)
from tests.support.waiting import until


@pytest.fixture(autouse=True)
def _there_is_a_server() -> None:
    sglang_address()


async def test_updates_under_load_are_told_apart_token_by_token(tmp_path: Path) -> None:
    """Full weights, adapters over the original ones, full weights again, and the original ones."""
    references: dict[int, Any] = {0: load(MODEL), 1: changed(1), 2: changed(2), 5: changed(5), 6: load(MODEL)}
    references[3], first = lora(tmp_path, 3, ATTENTION)
    references[4], second = lora(tmp_path, 4, ["q_proj", "v_proj"], use_rslora=True)
    updates = [
        full(tmp_path, references[1], 1),
        full(tmp_path, references[2], 2),
        first,
        second,
        full(tmp_path, references[5], 5),
        WeightsFile(None, WeightsKind.ORIGINAL, 6, ""),
    ]
    admitted: list[tuple[str, int]] = []
    checksums = []
    async with opened(tmp_path) as backend:
        load_now = Load(backend)
        checksums.append(await backend.replicas[0].checksum())
        for weights in updates:
            await load_now.more()
            await backend.update_weights(weights, admission(references, admitted))
            assert backend.policy_version == weights.policy_version
            # What is asked from now on is answered by these weights alone.
            sampled = await backend.generate(ask())
            assert {span.policy_version for span in sampled.policy_versions} == {weights.policy_version}
            checksums.append(await backend.replicas[0].checksum())
        await load_now.more()
        await load_now.stop()
        loaded = (await _adapters()) if backend.replicas[0].info.serving else set()
    assert [version for _, version in admitted] == [1, 2, 3, 4, 5, 6]
    assert checksums[0] == checksums[-1] and len(set(checksums)) == len(checksums) - 1
    assert not loaded, "an adapter that nothing uses is still there"
    for request, sampled in load_now.answers:
        assert_by_version(references, request, sampled)
    seen = {span.policy_version for _, sampled in load_now.answers for span in sampled.policy_versions}
    assert seen == {0, 1, 2, 3, 4, 5, 6}


async def test_a_request_under_way_goes_on_with_the_new_weights(tmp_path: Path) -> None:
    references = {0: load(MODEL), 1: changed(1)}
    async with opened(tmp_path) as backend:
        request = ask(temperature=50.0, max_tokens=100)
        for version in (1, 0) * 8:  # such a request may end by itself before the update
            parts = backend.stream(request)
            begun = [await anext(parts)]
            weights = full(tmp_path, references[1], 1) if version else WeightsFile(None, WeightsKind.ORIGINAL, 0, "")
            await backend.update_weights(weights, admission(references, []))
            begun += [part async for part in parts]
            tokens = tuple(token for part in begun for token in part.token_ids)
            values = tuple(value for part in begun for value in part.log_probs)
            spans = tuple(span for part in begun for span in part.policy_versions)
            assert_by_version(references, request, Sampled(tokens, values, None, spans))
            if len({span.policy_version for span in spans}) == 2:
                return
    raise AssertionError("every request ended before the update")


async def test_what_is_refused_leaves_the_old_weights(tmp_path: Path) -> None:
    references = {0: load(MODEL), 1: changed(1), 2: changed(2)}
    name = "model.layers.3.mlp.up_proj.weight"
    good = dict(references[2].named_parameters())[name].detach()
    poisoned = good.clone()
    poisoned[0, 0] = float("nan")
    wrong_rank = lora(tmp_path, 8, ["q_proj"], r=16)[1]
    wrong_place = lora(tmp_path, 9, ["down_proj"])[1]
    key = name.replace(".", "__")
    cases = {
        "another shape": full(tmp_path, references[2], 3, **{key: good[:8].clone()}),
        "a name missing": full(tmp_path, references[2], 4, **{key: None}),
        "nan": full(tmp_path, references[2], 5, **{key: poisoned}),
        "integers": full(tmp_path, references[2], 6, **{key: good.to(torch.int32)}),
        "no such rank": wrong_rank,
        "no such place": wrong_place,
    }
    admitted: list[tuple[str, int]] = []
    async with opened(tmp_path) as backend:
        await backend.update_weights(full(tmp_path, references[1], 1), admission(references, admitted))
        before = await backend.replicas[0].checksum()
        for case, weights in cases.items():
            with pytest.raises(DomainError) as caught:
                await backend.update_weights(weights, admission(references, admitted))
            assert caught.value.reason is Reason.MODEL_MISMATCH, f"{case}: {caught.value}"
            if weights.kind is WeightsKind.LORA:
                assert "refuses it: incident " in caught.value.message, "the server's words are in the log"
            assert backend.policy_version == 1, case
            request = ask()
            assert_by_version(references, request, await backend.generate(request))
            assert await backend.replicas[0].checksum() == before, case
        missing = WeightsFile(tmp_path / "nothing.safetensors", WeightsKind.FULL, 7, "0" * 64)
        with pytest.raises(DomainError) as caught:
            await backend.update_weights(missing, admission(references, admitted))
        assert caught.value.reason is Reason.WEIGHTS_NOT_FOUND
        assert [version for _, version in admitted] == [1]


async def test_what_the_servers_take_of_adapters_is_known_beforehand(tmp_path: Path) -> None:
    """A run with LoRA on all linear layers is refused when it starts, not when it publishes."""
    async with opened(tmp_path) as backend:
        limits = backend.model.lora
    assert limits == LoraLimits(8, tuple(sorted(ATTENTION)))
    info = PolicyInfo("embedded", "f", 0, 1024, 319, (1,), False, False, name="actor", backend="sglang", lora=limits)
    cases = ((8, ATTENTION, ""), (8, (*ATTENTION, "up_proj"), "target_modules"), (9, ATTENTION, "rank"))
    for rank, layers, field in cases:
        settings = RunSettings(environment="e", model=TrainedModelSettings(lora=LoraSettings(rank=rank)))
        if not field:
            check_actor(info, settings, "f", layers)
            continue
        with pytest.raises(DomainError) as caught:
            check_actor(info, settings, "f", layers)
        assert caught.value.metadata == {"field": f"model.lora.{field}"}


async def test_what_fails_its_check_is_replaced_by_the_next(tmp_path: Path) -> None:
    references = {1: changed(1), 2: changed(2)}
    async with opened(tmp_path) as backend:
        await backend.update_weights(full(tmp_path, references[1], 1), admission(references, []))
        with pytest.raises(DomainError) as caught:
            await backend.update_weights(full(tmp_path, references[1], 2), admission(references, []))
        assert caught.value.reason is Reason.CANARY_FAILED
        await backend.update_weights(full(tmp_path, references[1], 1), admission(references, []))
        request = ask()
        sampled = await backend.generate(request)
        assert backend.policy_version == 1 and sampled.policy_versions[0].policy_version == 1
        assert_by_version(references, request, sampled)


async def test_weights_that_somebody_else_loads_are_never_answered_from(tmp_path: Path) -> None:
    """Whether the server says that they are others, by an answer or a probe, or only where they are from."""
    references = {0: load(MODEL), 1: changed(1)}
    admitted: list[tuple[str, int]] = []
    async with opened(tmp_path) as backend:
        await backend.update_weights(full(tmp_path, references[1], 1), admission(references, admitted))
        request = ask(temperature=1.5)
        await control("/update_weights_from_disk", model_path=str(MODEL), weight_version="7-of-somebody")
        sampled = await backend.generate(request)
        assert sampled.policy_versions[0].policy_version == 1
        assert_by_version(references, request, sampled)
        assert len(admitted) == 2
        await control("/update_weights_from_disk", model_path=str(MODEL))  # under the old label
        await until(lambda: len(admitted) == 3)
        await until(lambda: backend.replicas[0].info.serving)
        assert_by_version(references, request, await backend.generate(request))
    assert {version for _, version in admitted} == {1}


async def test_fixed_adapters_are_asked_by_name(tmp_path: Path) -> None:
    opponent, weights = lora(tmp_path, 9, ATTENTION)
    async with opened(tmp_path, adapters={"opponent": str(weights.path)}) as backend:
        assert backend.model.adapters == ("opponent",)
        request = ask(adapter="opponent")
        plain = ask()
        assert_by_version({0: opponent}, request, await backend.generate(request))
        assert_by_version({0: load(MODEL)}, plain, await backend.generate(plain))
        trained, update = lora(tmp_path, 1, ["q_proj", "v_proj"])
        await backend.update_weights(update, admission({1: trained}, []))
        assert_by_version({1: trained}, plain, await backend.generate(plain))
        assert_by_version({0: opponent}, request, await backend.generate(request))


async def _adapters() -> set[str]:
    """What the server has loaded, once nothing is being unloaded."""
    for _ in range(200):
        if not (found := await loaded_adapters()):
            break
        await asyncio.sleep(0.05)
    return found
