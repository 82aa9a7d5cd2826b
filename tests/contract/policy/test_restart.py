"""How a policy service starts: with what LoadModel loaded before, or not at all, and then it says why."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from safetensors.numpy import save_file

from mulligan.common.channel import Endpoint
from mulligan.common.errors import Code, Reason
from mulligan.common.inference import CanaryProbe, Feature, PublishedWeights, VersionState, WeightsKind
from mulligan.policy.client import PolicyClient
from mulligan.policy.config import PolicySettings
from mulligan.policy.policies import Policies
from mulligan.testing.processes import ProcessFailed, ServiceProcesses
from mulligan.testing.weights import full_weights, load, sha256
from tests.support.llama_model import write_llama_model
from tests.support.scripted import Opened, refused, started
from tests.support.tiny_model import write_tiny_model


async def test_what_was_loaded_is_there_after_a_restart(tmp_path: Path) -> None:
    state = tmp_path / "state"
    policies = {"fixed": {"model": "three"}}
    async with started(state_folder=state, policies=policies) as running:
        await running.client.load_model("actor", "two", "", {"context_length": 20})
        await running.client.load_model("other", "one")
        await running.client.load_model("gone", "one")
        await running.client.unload_model("gone")
        await refused(running.client.load_model("fixed", "bad"), Reason.UNSUPPORTED_MODEL)
    for _ in range(2):
        async with started(state_folder=state, policies=policies) as running:
            assert [info.name for info in await running.client.policies()] == ["actor", "fixed", "other"]
            await running.serves("two", 1)
            await running.serves("one", 0, "other")
            await running.serves("three", 0, "fixed")
            assert (await running.client.info()).context_length == 20
            assert len(running.opened.backends) == 3
    async with started(state_folder=state, policies=policies) as running:
        assert await running.client.load_model("gone", "one") == (1, "one"), "versions never repeat"
    assert sorted(path.name for path in (state / "policies" / "actor").iterdir()) == [
        "files",
        "lock",
        "model.json",
        "versions.db",
    ]
    assert (state / "policies" / "actor" / "model.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"model": "one"}, {"model": "three"}),
        ({"model": "one"}, {"model": "one", "context_length": 16}),
        ({"model": "three", "policies": {"actor2": {"model": "one"}}}, {"model": "three", "default_policy": "actor"}),
    ],
)
async def test_settings_that_changed_replace_what_was_loaded(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    name = next(iter(before.get("policies", {"actor": {}})))
    async with started(state_folder=tmp_path, **before) as running:
        await running.client.load_model(name, "two")
    with structlog.testing.capture_logs() as logs:
        async with started(state_folder=tmp_path, **after) as running:
            if name in ("actor",):
                await running.serves(after["model"], 2)
            assert [info.model for info in await running.client.policies()] == [after["model"]]
    [warning] = [entry for entry in logs if entry["log_level"] == "warning" and "settings" in entry["event"]]
    assert warning["policy"] == name
    with structlog.testing.capture_logs() as logs:
        async with started(state_folder=tmp_path, **after) as running:
            assert [info.model for info in await running.client.policies()] == [after["model"]]
    assert [entry for entry in logs if entry["log_level"] == "warning"] == []


@pytest.mark.parametrize(
    ("own", "options", "digest"),
    [
        ({}, {}, "c0380102aad19fbe04fa4b82507f8e2b9c6edd7a0e8ee9de0bf549cf63b71d9e"),
        (
            {
                "backend": "sglang",
                "sglang": {"servers": ["http://h:1"], "api_key": "k", "insecure": True},
                "allowed_addresses": ["http://h:2"],
            },
            {"sglang.servers": ["http://h:2"]},
            "7747f4eec4b538f1cfc927189c6fe4bc430c417eac44ee95f959004ec078547f",
        ),
    ],
)
async def test_what_was_loaded_and_trained_is_there_after_an_upgrade(
    tmp_path: Path, own: dict[str, Any], options: dict[str, Any], digest: str
) -> None:
    """0.1.0 made another digest of the policy's own settings, which is this one."""
    state = tmp_path / "state"
    settings = {"model": "embedded", "threads": 0, "state_folder": state, "weights_folder": tmp_path, **own}
    weights = tmp_path / "w.safetensors"
    save_file({"w": np.zeros(3, np.float32)}, weights)
    canary = (CanaryProbe((1, 2, 3), (-1.0, -1.0)),)
    async with started(**settings) as running:
        await running.client.load_model("actor", "two", "", options)
        published = PublishedWeights(2, WeightsKind.FULL, weights.as_uri(), sha256(weights), "two", canary)
        await running.client.update_weights(published)
        before = await running.client.versions()
    kept = state / "policies" / "actor" / "model.json"
    request = json.loads(kept.read_text())
    del request["crc32"]  # as 0.1.0 wrote it
    kept.write_text(json.dumps(request | {"own": digest}))
    for _ in range(2):
        async with started(**settings) as running:
            await running.serves("two", 2)
            assert await running.client.versions() == before
        assert {**json.loads(kept.read_text()), "crc32": ""} == request | {"crc32": ""}
    assert [path.name for path in (state / "policies" / "actor" / "files").iterdir()] == ["2"]


async def test_weights_of_a_kind_that_the_engine_takes_no_longer_are_not_served(tmp_path: Path) -> None:
    """As when a policy becomes a guest on servers of another: it begins anew, and its versions go on."""
    weights = tmp_path / "w.safetensors"
    save_file({"w": np.zeros(3, np.float32)}, weights)
    settings: dict[str, Any] = {"state_folder": tmp_path / "state", "weights_folder": tmp_path}
    async with started(**settings) as running:
        canary = (CanaryProbe((1, 2, 3), (-1.0, -1.0)),)
        await running.client.update_weights(
            PublishedWeights(1, WeightsKind.FULL, weights.as_uri(), sha256(weights), "one", canary)
        )
    fewer = frozenset(Feature) - {Feature.FULL_WEIGHTS}
    for _ in range(2):
        async with started(Opened(features=fewer), **settings) as running:
            await running.serves("one", 2)
            assert [one.kind for one in await running.client.versions()] == [
                *(WeightsKind.ORIGINAL, WeightsKind.FULL, WeightsKind.ORIGINAL)
            ]
            await refused(running.client.rollback(1), Reason.VERSION_NOT_KEPT, Code.NOT_FOUND)


async def test_a_loaded_model_that_is_gone_stops_the_start_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m"
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {"state_folder": tmp_path / "state", "models_folder": tmp_path / "models"}
    async with started(**settings) as running:
        await running.client.load_model("actor", str(folder))
    plain = {"model": "one", "threads": 1, "state_folder": tmp_path / "state"}
    with pytest.raises(ExceptionGroup, match=r"actor: .*loads no folders.*model\.json"):
        await Policies.open(PolicySettings.model_validate(plain), Opened().create)
    (tmp_path / "state" / "policies" / "actor" / "model.json").write_text("{")
    with pytest.raises(ExceptionGroup, match=r"actor: .*model\.json is damaged"):
        await Policies.open(PolicySettings.model_validate(plain | settings), Opened().create)


async def test_a_damaged_record_of_a_version_stops_no_start(tmp_path: Path) -> None:
    policies = {"other": {"model": "three"}}
    async with started(state_folder=tmp_path, policies=policies) as running:
        await running.serves("one", 0)
    path = tmp_path / "policies" / "actor" / "versions.db"
    with sqlite3.connect(path) as db:
        db.execute("UPDATE records SET kind = 'originam'")
    db.close()
    with structlog.testing.capture_logs() as logs:
        async with started(state_folder=tmp_path, policies=policies) as running:
            await running.serves("one", 1)
            await running.serves("three", 0, "other")
            newest, lost = await running.client.versions()
            assert (newest.policy_version, lost.policy_version, lost.state) == (1, 0, VersionState.REMOVED)
            assert "versions.db was damaged" in lost.problem
            error = await refused(running.client.rollback(0), Reason.VERSION_NOT_KEPT, Code.NOT_FOUND)
            assert "versions.db was damaged" in error.message
    [told] = [entry for entry in logs if entry["log_level"] == "error"]
    assert (told["file"], told["policy_version"]) == (str(path), 0)


async def test_a_killed_service_comes_back_with_what_was_loaded(tmp_path: Path, services: ServiceProcesses) -> None:
    llama = write_llama_model(tmp_path / "models" / "llama")
    settings: dict[str, Any] = {
        "state_folder": tmp_path / "state",
        "models_folder": tmp_path / "models",
        "weights_folder": tmp_path,
    }
    process = services.start("policy", model=write_tiny_model(tmp_path / "tiny"), threads=1, **settings)
    client = PolicyClient(Endpoint(process.address))
    version, fingerprint = await client.load_model("actor", str(llama))
    tensors = {name: tensor * 1.5 for name, tensor in load(llama).state_dict().items()}
    await client.update_weights(full_weights(tmp_path / "w", tensors, version + 1, fingerprint))
    before = await client.score([[5, 6, 7]])
    process.restart()
    assert await client.score([[5, 6, 7]]) == before
    info = await client.info()
    assert (info.model, info.fingerprint, info.policy_version) == ("llama", fingerprint, version + 1)
    assert await client.load_model("actor", str(llama)) == (version + 1, fingerprint)
    await client.close()
    assert process.stop() == 0


def test_a_policy_that_cannot_be_opened_is_named_at_the_start(services: ServiceProcesses) -> None:
    policies = {"judge": {"backend": "openai"}, "reference": {"backend": "openai", "openai": {"base_url": "x"}}}
    with pytest.raises(ProcessFailed) as caught:
        services.start("policy", backend="openai", openai={"base_url": "http://127.0.0.1:1/v1"}, policies=policies)
    text = str(caught.value)
    assert "ended with status 2" in text
    assert "\n  judge: openai.base_url: " in text and "\n  reference: openai.base_url: " in text
    assert "\n  actor" not in text, "its endpoint may come later"
