"""A state folder has one policy service, whatever its policies are called."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.inference import WeightsKind
from mulligan.policy.config import PolicySettings
from mulligan.policy.policies import Policies
from mulligan.policy.uploads import UploadHeader
from mulligan.testing.processes import ProcessFailed, ServiceProcesses
from tests.support.scripted import Opened, started
from tests.support.tiny_model import write_tiny_model

CONTENT = (8).to_bytes(8, "little") + b'{"a":1} ' + b"x" * 100
HEADER = UploadHeader(WeightsKind.FULL, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def settings(state: Path, **others: Any) -> PolicySettings:
    return PolicySettings.model_validate({"model": "one", "threads": 1, "state_folder": state, **others})


@pytest.mark.parametrize("place", ["state", "link", "state/../state"])
async def test_a_second_service_gets_no_folder_and_leaves_the_first_ones_upload_alone(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "state", target_is_directory=True)
    first = await Policies.open(settings(tmp_path / "state"), Opened().create)
    go_on = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield CONTENT[:50]
        await go_on.wait()
        yield CONTENT[50:]

    upload = asyncio.create_task(first.uploads.receive(HEADER, chunks(), lambda _: (tmp_path / "none").open("rb")))
    try:
        while not list((tmp_path / "state" / "uploads").iterdir()):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        folder = tmp_path / place
        with pytest.raises(OSError, match=f"state_folder: {folder} is in use by another policy service"):
            await Policies.open(settings(folder, default_policy="another"), Opened().create)
        go_on.set()
        assert (await upload).startswith("upload:")
    finally:
        go_on.set()
        await first.close()
    await (await Policies.open(settings(tmp_path / "state", default_policy="another"), Opened().create)).close()


async def test_a_start_that_fails_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup):
        await Policies.open(settings(tmp_path, model="bad"), Opened().create)
    async with started(state_folder=tmp_path) as running:
        await running.serves("one", 0)


def test_the_second_process_says_which_folder_it_cannot_have(tmp_path: Path, services: ServiceProcesses) -> None:
    given: dict[str, Any] = {"model": write_tiny_model(tmp_path / "tiny"), "threads": 1}
    state = tmp_path / "state"
    services.start("policy", state_folder=state, **given)
    with pytest.raises(ProcessFailed) as caught:
        services.start("policy", state_folder=state, default_policy="another", **given)
    assert f"policy: bad settings\n  state_folder: {state} is in use by another policy service" in str(caught.value)
    assert "Traceback" not in str(caught.value)
