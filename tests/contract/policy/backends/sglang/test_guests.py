"""Two policies on one real SGLang server: one sets its weights, the other has adapters of its own there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, WeightsKind
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy.backend import WeightsFile
from mulligan.policy.backends.sglang import Settings as SglangSettings
from mulligan.testing.weights import load
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


@pytest.fixture
def guest() -> SglangSettings:
    return SglangSettings(servers=(sglang_address(),), adapters_only=True, probe_seconds=0.2, wait_seconds=60)


async def test_each_serves_its_own_adapter_while_the_other_takes_new_ones(
    tmp_path: Path, guest: SglangSettings
) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
    references: dict[int, Any] = {0: load(MODEL)}
    others: dict[int, Any] = {0: load(MODEL)}
    async with opened(mine) as owner, opened(theirs, guest) as second:
        assert not {Feature.FULL_WEIGHTS, Feature.MEMORY_RELEASE} & second.model.features
        loads = [Load(owner, 2), Load(second, 2)]
        for one in loads:
            await one.more(2)
        for version in (1, 2):
            references[version], weights = lora(mine, version, ATTENTION)
            await owner.update_weights(weights, admission(references, []))
            if version == 1:
                others[5], weights = lora(theirs, 5, ["q_proj", "v_proj"])
                await second.update_weights(weights, admission(others, []))
            for one in loads:
                await one.more(2)
        assert (owner.policy_version, second.policy_version) == (2, 5)
        for one in loads:
            await one.stop()
        assert all(replica.info.serving for backend in (owner, second) for replica in backend.replicas)
        assert {replica.info.problem for backend in (owner, second) for replica in backend.replicas} == {""}
    for one, known in zip(loads, (references, others), strict=True):
        for request, sampled in one.answers:
            assert_by_version(known, request, sampled)
        assert {span.policy_version for _, sampled in one.answers for span in sampled.policy_versions} == set(known)


async def test_a_guest_streams_and_goes_back_to_the_original_weights(tmp_path: Path, guest: SglangSettings) -> None:
    async with opened(tmp_path / "mine"), opened(tmp_path / "theirs", guest) as second:
        tuned, weights = lora(tmp_path, 4, ATTENTION)
        await second.update_weights(weights, admission({4: tuned}, []))
        parts = [part async for part in second.stream(ask(max_tokens=60, temperature=2.5))]
        assert len([part for part in parts if part.token_ids]) > 1, "it does not wait for the end"
        await second.update_weights(WeightsFile(None, WeightsKind.ORIGINAL, 6, ""), admission({6: load(MODEL)}, []))
        assert_by_version({6: load(MODEL)}, ask(), await second.generate(ask()))


async def test_a_guest_that_lost_its_adapter_loads_it_again(tmp_path: Path, guest: SglangSettings) -> None:
    async with opened(tmp_path / "mine") as owner, opened(tmp_path / "theirs", guest) as second:
        tuned, weights = lora(tmp_path, 4, ATTENTION)
        await second.update_weights(weights, admission({4: tuned}, []))
        await control("/unload_lora_adapter", lora_name=second.pool.target.adapter)
        assert_by_version({4: tuned}, ask(), await second.generate(ask()))
        assert_by_version({0: load(MODEL)}, ask(), await owner.generate(ask()))


async def test_a_guest_that_leaves_takes_its_adapters_along(tmp_path: Path, guest: SglangSettings) -> None:
    _, opponent = lora(tmp_path, 9, ATTENTION)
    async with opened(tmp_path / "mine") as owner:
        mine, weights = lora(tmp_path, 1, ATTENTION)
        await owner.update_weights(weights, admission({1: mine}, []))
        async with opened(tmp_path / "theirs", guest, adapters={"opponent": str(opponent.path)}) as second:
            tuned, weights = lora(tmp_path, 4, ATTENTION)
            await second.update_weights(weights, admission({4: tuned}, []))
            assert len(await loaded_adapters()) == 3
        assert await loaded_adapters() == {owner.pool.target.adapter}
        assert_by_version({1: mine}, ask(), await owner.generate(ask()))


async def test_under_other_full_weights_a_guest_does_not_serve(tmp_path: Path, guest: SglangSettings) -> None:
    guest = guest.model_copy(update={"wait_seconds": 0.5})
    async with opened(tmp_path / "mine") as owner, opened(tmp_path / "theirs", guest) as second:
        models = {1: changed(1), 2: load(MODEL)}
        await owner.update_weights(full(tmp_path, models[1], 1), admission(models, []))
        await until(lambda: not second.replicas[0].info.serving)
        with pytest.raises(DomainError, match=r"adapters_only needs those that the model came with|instead of") as info:
            await second.generate(ask())
        assert info.value.reason is Reason.ENGINE_UNAVAILABLE
        with pytest.raises(UnsupportedModel, match=r"holds weights '1-.*' of the policy that sets them"):
            async with opened(tmp_path / "third", guest):
                pass
        await owner.update_weights(WeightsFile(None, WeightsKind.ORIGINAL, 2, ""), admission(models, []))
        await until(lambda: second.replicas[0].info.serving)
        assert_by_version({0: load(MODEL)}, ask(), await second.generate(ask()))


async def test_the_owner_alone_restores_a_server_that_somebody_changed(tmp_path: Path, guest: SglangSettings) -> None:
    async with opened(tmp_path / "mine") as owner, opened(tmp_path / "theirs", guest) as second:
        tuned, weights = lora(tmp_path, 4, ATTENTION)
        await second.update_weights(weights, admission({4: tuned}, []))
        mine, theirs = owner.pool.servers[0], second.pool.servers[0]
        before = mine.times_let_in
        await control("/update_weight_version", new_version="somebody", abort_all_requests=False)
        await until(lambda: mine.times_let_in > before)  # the guest may not have noticed
        await until(lambda: mine.serving and theirs.serving and theirs.label == mine.label == owner.pool.target.label)
        parts = [part async for part in second.stream(ask(max_tokens=60, temperature=2.5))]
        assert len([part for part in parts if part.token_ids]) > 1, "the guest knows what the weights are called now"
        assert_by_version({4: tuned}, ask(), await second.generate(ask()))
        assert_by_version({0: load(MODEL)}, ask(), await owner.generate(ask()))
