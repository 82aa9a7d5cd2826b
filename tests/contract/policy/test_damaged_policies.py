"""A policy service of which one policy's files are damaged: it says so, and the others serve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from mulligan.common.errors import Code, Reason
from mulligan.common.inference import CallOptions
from mulligan.policy.config import PolicySettings
from mulligan.policy.policies import Policies
from mulligan.policy.servicer import SERVICE, health
from tests.support.scripted import Opened, refused, started

DEFAULT = {"model": "one", "threads": 1}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def says(**changes: Any) -> Callable[[Path], None]:
    """Changed by hand, without the checksum."""

    def change(path: Path) -> None:
        document = json.loads(path.read_text()) | changes
        del document["crc32"]
        path.write_text(json.dumps(document))

    return change


def in_place_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("model.json", flip),
    ("model.json", lambda path: path.write_bytes(b"")),
    ("model.json", lambda path: path.write_bytes(b"[1]")),
    ("model.json", in_place_of),
    ("model.json", says(model=5)),
    ("model.json", says(model="bad")),
    ("model.json", says(backend="none-such")),
    ("model.json", says(options={"context_length": "[]"})),
    ("versions.db", lambda path: path.write_bytes(b"junk" * 1000)),
    ("versions.db", lambda path: path.write_bytes(path.read_bytes()[:6000])),
    ("versions.db", in_place_of),
]


async def loaded(state: Path) -> None:
    async with started(state_folder=state) as running:
        await running.client.load_model("other", "one")
        await running.client.load_model("third", "three")


@pytest.mark.parametrize(("file", "damage"), DAMAGES, ids=[f"{file}-{at}" for at, (file, _) in enumerate(DAMAGES)])
async def test_damage_of_a_further_policy_costs_that_policy(
    tmp_path: Path, file: str, damage: Callable[[Path], object]
) -> None:
    await loaded(tmp_path)
    path = tmp_path / "policies" / "other" / file
    damage(path)
    with structlog.testing.capture_logs() as logs:
        async with started(state_folder=tmp_path) as running:
            await running.serves("one", 0)
            await running.serves("three", 0, "third")
            assert [info.name for info in await running.client.policies()] == ["actor", "third"]
            for call in (
                running.client.info("other"),
                running.client.tokenize("x", CallOptions(policy="other")),
                running.client.versions("other"),
                running.client.release_memory("other"),
            ):
                error = await refused(call, Reason.STATE_DAMAGED, Code.DATA_LOSS)
                assert error.metadata["file"] == str(path)
                assert "the policy other is not served since the service started: " in error.message
    [told] = [entry for entry in logs if entry["log_level"] == "error"]
    assert told["policy"] == "other"


async def test_health_says_which_policy_does_not_serve(tmp_path: Path) -> None:
    await loaded(tmp_path)
    flip(tmp_path / "policies" / "other" / "model.json")
    given = PolicySettings.model_validate({**DEFAULT, "state_folder": tmp_path})
    policies = await Policies.open(given, Opened().create)
    try:
        assert health(policies) == {
            SERVICE: True,
            f"{SERVICE}/actor": True,
            f"{SERVICE}/third": True,
            f"{SERVICE}/other": False,
        }
        await policies.load_model("other", "two")
        assert health(policies)[f"{SERVICE}/other"]
    finally:
        await policies.close()


async def test_a_damaged_policy_serves_again_with_a_loaded_model_or_is_forgotten(tmp_path: Path) -> None:
    await loaded(tmp_path)
    for name in ("other", "third"):
        flip(tmp_path / "policies" / name / "model.json")
    async with started(state_folder=tmp_path) as running:
        await running.client.load_model("other", "two")
        await running.serves("two", 1, "other")
        await running.client.unload_model("third")
        await refused(running.client.info("third"), Reason.UNKNOWN_POLICY, Code.NOT_FOUND)
    with structlog.testing.capture_logs() as logs:
        async with started(state_folder=tmp_path) as running:
            assert [info.name for info in await running.client.policies()] == ["actor", "other"]
    assert not [entry for entry in logs if entry["log_level"] == "error"]


async def test_a_model_cannot_be_loaded_over_a_damaged_database(tmp_path: Path) -> None:
    await loaded(tmp_path)
    path = tmp_path / "policies" / "other" / "versions.db"
    path.write_bytes(b"junk" * 1000)
    async with started(state_folder=tmp_path) as running:
        for _ in range(2):
            error = await refused(running.client.load_model("other", "two"), Reason.STATE_DAMAGED, Code.DATA_LOSS)
            assert f"cannot use {path}" in error.message and "move it away" in error.message
        path.unlink()
        await running.client.load_model("other", "two")
        await running.serves("two", 0, "other")


async def test_a_policy_of_the_settings_with_a_damaged_database_stops_no_other(tmp_path: Path) -> None:
    policies = {"fixed": {"model": "three"}}
    async with started(state_folder=tmp_path, policies=policies) as running:
        await running.serves("three", 0, "fixed")
    (tmp_path / "policies" / "fixed" / "versions.db").write_bytes(b"junk" * 1000)
    async with started(state_folder=tmp_path, policies=policies) as running:
        await running.serves("one", 0)
        await refused(running.client.info("fixed"), Reason.STATE_DAMAGED, Code.DATA_LOSS)


@pytest.mark.parametrize("file", ["model.json", "versions.db"])
async def test_damage_of_the_default_policy_stops_the_start(tmp_path: Path, file: str) -> None:
    async with started(state_folder=tmp_path) as running:
        await running.client.load_model("actor", "two")
    (tmp_path / "policies" / "actor" / file).write_bytes(b"junk" * 1000)
    with pytest.raises(ExceptionGroup, match=f"actor: .*{file}"):
        await Policies.open(PolicySettings.model_validate({**DEFAULT, "state_folder": tmp_path}), Opened().create)


@pytest.mark.parametrize("name", ["other (copy)", "_old", ".b", "q" * 80, "other\n"])
async def test_a_copied_folder_is_no_policy(tmp_path: Path, name: str) -> None:
    await loaded(tmp_path)
    shutil.copytree(tmp_path / "policies" / "other", tmp_path / "policies" / name)
    with structlog.testing.capture_logs() as logs:
        async with started(state_folder=tmp_path) as running:
            assert [info.name for info in await running.client.policies()] == ["actor", "other", "third"]
    [told] = [entry for entry in logs if "no policy can have its name" in entry["event"]]
    assert told["folder"] == str(tmp_path / "policies" / name)


async def test_a_guest_that_cannot_be_opened_costs_that_policy() -> None:
    """Its servers hold what another policy serves, which must not stop the service."""
    second = {"backend": "sglang", "model": "bad", "sglang": {"servers": ("http://h:1",), "adapters_only": True}}
    settings: dict[str, Any] = {"model": "one", "sglang": {"servers": ("http://h:1",)}, "policies": {"second": second}}
    async with started(backend="sglang", **settings) as running:
        await running.serves("one", 0)
        error = await refused(running.client.info("second"), Reason.STATE_DAMAGED, Code.DATA_LOSS)
        assert error.message.startswith("the policy second is not served since the service started: ")
