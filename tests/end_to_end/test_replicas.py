"""A run on two env and two policy servers, of each of which one is killed under way, and comes back knowing nothing."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.channel import Endpoint
from mulligan.policy.client import PolicyClient
from mulligan.testing.loop import RUN_SECONDS, Loop, small_run
from mulligan.testing.processes import ServiceProcess, ServiceProcesses


def start(services: ServiceProcesses, folder: Path) -> tuple[Loop, ServiceProcess, ServiceProcess]:
    """The loop, and the second env and policy server."""
    (folder / "weights").mkdir()
    policy = {"weights_folder": folder / "elsewhere", "threads": 1}  # nothing is shared: weights are uploaded
    settings: list[tuple[str, dict[str, Any]]] = [("env", {})] * 2 + [("policy", policy)] * 2
    settings.append(("memory", {"database": folder / "memory.sqlite"}))
    with ThreadPoolExecutor() as pool:
        started = [pool.submit(services.start, name, **values) for name, values in settings]
    env, second_env, policies, second_policy, memory = (process.result() for process in started)
    trainer = services.start(
        "trainer",
        runs_folder=folder / "runs",
        checkpoint_folder=folder / "checkpoints",
        weights_folder=folder / "weights",
        weights_transfer="upload",
        env_address=f"{env.address},{second_env.address}",
        policy_address=f"{policies.address},{second_policy.address}",
        memory_address=memory.address,
        outage_seconds=60,
        lost_seconds=0.5,
        threads=1,
    )
    return Loop(folder, env, policies, memory, trainer), second_env, second_policy


def answered(server: ServiceProcess, method: str) -> int:
    """Since its last start; also the call for several, as StartEpisodes."""
    return sum(str(line.get("method")).startswith(method) and line["status"] == "OK" for line in server.log_lines)


def used_again(trainer: ServiceProcess, server: ServiceProcess) -> bool:
    lines = [line for line in trainer.log_lines if line.get("endpoint") == server.address]
    return [line["event"] for line in lines][-1:] == ["a server is used again"]


async def version_at(server: ServiceProcess) -> int:
    client = PolicyClient(Endpoint(server.address))
    try:
        return (await client.info()).policy_version
    finally:
        await client.close()


@pytest.mark.long
async def test_a_run_goes_on_without_a_server_of_each_kind(services: ServiceProcesses, tmp_path: Path) -> None:
    loop, env, policy = await asyncio.to_thread(start, services, tmp_path)
    trainer = loop.client()
    await trainer.start("first", small_run(steps=3))
    await loop.journal_grows("first", 2000)
    policy.kill()
    env.kill()
    await loop.journal_grows("first", 2000)
    await asyncio.gather(asyncio.to_thread(policy.start), asyncio.to_thread(env.start))
    await loop.ended(trainer, "first")
    await trainer.close()
    async with asyncio.timeout(RUN_SECONDS):  # it is brought to the run's version, asked or not
        while await version_at(policy) != 4 or not used_again(loop.trainer, env):  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.1)
    await loop.train("second", small_run(steps=1))
    assert [await version_at(server) for server in (loop.policy, policy)] == [6, 6]
    assert all(answered(server, "StartEpisode") for server in (loop.env, env)), "what came back is used as well"
    assert all(answered(server, "Generate") for server in (loop.policy, policy))
    notices = "\n".join(await loop.notices("first"))
    assert all(f"a server is not used endpoint={server.address}" in notices for server in (env, policy))
    for run_id, versions in (("first", [1, 2, 3]), ("second", [5])):
        metrics = await loop.metrics(run_id)
        assert [step["policy_version"] - 1 for step in metrics] == versions
        assert all(step["excluded"] == 0 and step["canary_difference"] < 1e-4 for step in metrics)
        for chain in loop.experiences(run_id):
            segments = [segment for part in chain.samples for found in part.sequences for segment in found.segments]
            spans = [span for segment in segments for span in segment.policy_versions]
            assert spans and {span.policy_version for span in spans} == {versions[chain.step]}
