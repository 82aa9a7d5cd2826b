"""Several SGLang servers, launched and supervised by the backend, and what happens when one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mulligan.common.inference import WeightsKind
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy.backend import WeightsFile
from mulligan.policy.backends.sglang import Settings as SglangSettings
from mulligan.testing.weights import load
from tests.support.found import sglang_address
from tests.support.sglang import (
    MODEL,
    START_SECONDS,
    Load,
    admission,
    ask,
    assert_by_version,
    changed,
    full,
    launching,
    opened,
)
from tests.support.tiny_model import write_tiny_model
from tests.support.waiting import until


@pytest.mark.long
@pytest.mark.timeout(2 * START_SECONDS + 120)
async def test_a_server_that_is_killed_under_load_is_not_noticed(tmp_path: Path) -> None:
    """No caller sees an error or an answer of a stale version; the server comes back with the present weights only,
    though they changed while it was away, and it comes with the original ones."""
    references: dict[int, Any] = {0: load(MODEL), 1: changed(1), 2: changed(2)}
    admitted: list[tuple[str, int]] = []
    async with opened(tmp_path, launching(2, probe_seconds=0.2)) as backend:
        first, second = (replica.info.address for replica in backend.replicas)
        await _answer_their_service_alone(tmp_path, first)
        await backend.update_weights(full(tmp_path, references[1], 1), admission(references, admitted))
        assert admitted == [(first, 1), (second, 1)]
        load_now = Load(backend, callers=8)
        await load_now.more(8)
        [pid] = _processes(first)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not backend.replicas[0].info.serving)
        await load_now.more(8)
        await backend.update_weights(full(tmp_path, references[2], 2), admission(references, admitted))
        assert admitted[2:] == [(second, 2)]
        await load_now.stop()
        meanwhile = Load(backend, callers=2, pause=0.5)
        await until(lambda: all(replica.info.serving for replica in backend.replicas), START_SECONDS)
        assert [version for _, version in admitted] == [1, 1, 2, 2]
        await meanwhile.more(8)
        await meanwhile.stop()
        addresses = [replica.info.address for replica in backend.replicas]
        checksums = {await replica.checksum() for replica in backend.replicas}
        assert len(checksums) == 1
    for request, sampled in [*load_now.answers, *meanwhile.answers]:
        assert_by_version(references, request, sampled)
    assert {span.policy_version for _, sampled in meanwhile.answers for span in sampled.policy_versions} == {2}
    assert [_processes(address) for address in (first, *addresses)] == [[], [], []]


async def _answer_their_service_alone(folder: Path, address: str) -> None:
    """The key that the policy made for a server is needed for all but probes; without it nobody changes its weights."""
    async with aiohttp.ClientSession() as stranger:
        for method, path in (("GET", "/model_info"), ("POST", "/generate"), ("POST", "/update_weights_from_disk")):
            for headers in ({}, {"Authorization": "Bearer guessed"}):
                async with stranger.request(method, address + path, json={}, headers=headers) as answer:
                    assert answer.status == 401, path
        [key] = json.loads((folder / "engine" / "sglang-0.keys.yaml").read_text()).values()
        assert address.rpartition(":")[2] in _listed() and key not in _listed()


def _listed() -> str:
    """What any user sees of all processes."""
    return subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout


async def test_servers_of_other_models_are_refused(tmp_path: Path) -> None:
    sglang_address()
    other = write_tiny_model(tmp_path / "other")
    with pytest.raises(UnsupportedModel, match="other"):
        async with opened(tmp_path, model=str(other)):
            pass


async def test_one_server_of_two_is_enough(tmp_path: Path) -> None:
    """The other one does not answer, and says so; nothing waits for it."""
    settings = SglangSettings(servers=("http://127.0.0.1:9", sglang_address()), probe_seconds=0.2)
    references = {0: load(MODEL), 1: changed(1)}
    async with opened(tmp_path, settings) as backend:
        absent, present = (replica.info for replica in backend.replicas)
        assert not absent.serving and "127.0.0.1:9" in absent.problem and present.serving
        await backend.update_weights(full(tmp_path, references[1], 1), admission(references, []))
        assert_by_version(references, ask(), await backend.generate(ask()))
        await backend.update_weights(WeightsFile(None, WeightsKind.ORIGINAL, 0, ""), admission(references, []))


async def test_no_server_at_all_is_said(tmp_path: Path) -> None:
    settings = SglangSettings(servers=("http://127.0.0.1:9",), start_seconds=0.1)
    with pytest.raises(UnsupportedModel, match=r"127\.0\.0\.1:9"):
        async with opened(tmp_path, settings):
            pass


def _processes(address: str) -> list[int]:
    """Of servers that were told to listen there, the first of each."""
    port = address.rpartition(":")[2].encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                arguments = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it ended
                continue
            pid = int(folder.name)
            if b"sglang.launch_server" in arguments and port in arguments and os.getsid(pid) == pid:
                found.append(pid)
    return found
