"""From a clean clone to a trained agent in containers, on a real engine. Every service is restarted on the way."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mulligan.common.types import Outcome
from mulligan.memory.client import MemoryClient
from mulligan.testing.compose import Project, image, missing
from mulligan.testing.loop import is_memorable
from mulligan.trainer.client import RunClient
from mulligan.trainer.folder import RunState
from mulligan.trainer.journal import journal_file, journaled_steps, read_experiences
from proof import CaseUnavailable

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ("env", "policy", "memory", "trainer")
RECIPE = "frozenlake-3x3"
RUN = "proof"
HEALTHY_SECONDS = 60.0
DOWN_SECONDS = 10.0
SUCCESS = 0.9  # of the test boards at the end; the demo's runs reached 0.94 and more
BYTES_OVER_BASE = 250 * 10**6  # of the images without torch
RUN_SECONDS = 3600.0
SCALE_STEPS = 24
VERSION = """
import asyncio
from pathlib import Path
from mulligan.common.channel import Endpoint
from mulligan.common.tls import ClientTls
from mulligan.policy.client import PolicyClient

async def main():
    tls = ClientTls(ca=Path("/run/tls/ca.crt"))
    endpoint = Endpoint("127.0.0.1:50052", token_file=Path("/run/tokens/reader"), tls=tls)
    print((await PolicyClient(endpoint).info("")).policy_version)

asyncio.run(main())
"""  # of one replica, asked in its own container


def across_containers(folder: Path) -> dict[str, Any]:
    """Runs the demo's recipe. After each seventh of it a service is restarted, and at last all containers are removed
    and created again. `build_seconds` is the time for layers that were not built before."""
    clone = clean_clone(folder)
    commit = git("rev-parse", "HEAD")
    base = image("python:3.11-slim")["Size"]
    project = Project(
        "mulligan-proof", folder=clone / "docker", variables={"MULLIGAN_TAG": "proof", "REVISION": commit}
    )
    project.build = False
    project.run("down", "--volumes")  # what an interrupted proof has left
    result: dict[str, Any] = {"build_seconds": seconds(lambda: project.run("build"))}
    sizes = {name: image(name, "proof")["Size"] for name in SERVICES}
    result["megabytes"] = {"base": round(base / 1e6)} | {name: round(size / 1e6) for name, size in sizes.items()}
    result["megabytes_over_base"] = {name: round((size - base) / 1e6) for name, size in sizes.items()}
    print(json.dumps(result), flush=True)
    start = time.monotonic()
    with project:
        result["healthy_seconds"] = round(time.monotonic() - start, 1)
        result |= asyncio.run(_train(project))
        result |= asyncio.run(_check(project, folder / "runs"))
        result["down_seconds"] = seconds(lambda: project.run("down"))
    assert all(sizes[name] - base <= BYTES_OVER_BASE for name in ("env", "memory")), result
    assert result["healthy_seconds"] <= HEALTHY_SECONDS, result
    assert max(result["down_seconds"], result["down_seconds_during_the_run"]) < DOWN_SECONDS, result
    assert result["test_success_after"] >= SUCCESS > result["test_success_before"], result
    return result


async def _train(project: Project) -> dict[str, Any]:
    print(project.execute("trainer", "mulligan", "train", RECIPE, "--run-id", RUN, "--no-watch").stdout, flush=True)
    client = RunClient(project.endpoint("trainer"))
    steps = (await client.get(RUN)).settings.steps
    restarts: dict[str, float] = {}
    places: dict[str, int] = {}
    try:
        for number, name in enumerate(SERVICES, 1):
            places[name] = await _reached(client, steps * number // 7)
            restarts[name] = await asyncio.to_thread(seconds, partial(project.run, "restart", name))
            print(f"restarted {name} at step {places[name]}: {restarts[name]} s", flush=True)
        places["down"] = await _reached(client, steps * 5 // 7)
        down = await asyncio.to_thread(seconds, lambda: project.run("down"))
        up = await asyncio.to_thread(seconds, lambda: project.run("up", "--wait"))
        print(f"down at step {places['down']} in {down} s, up again in {up} s", flush=True)
        await _reached(client, steps)
        async for _ in client.watch(RUN):
            pass
        info = await client.get(RUN)
    finally:
        await client.close()
    assert info.state is RunState.COMPLETED, f"{info.state}: {info.error}"
    return {
        "restarted_at_step": places,
        "restart_seconds": restarts,
        "down_seconds_during_the_run": down,
        "up_seconds_during_the_run": up,
    }


def replicas(folder: Path) -> dict[str, Any]:
    """Runs with two env and two policy replicas. On the way a third policy replica joins and an env replica is killed.
    At the end every policy replica must serve the run's version."""
    project = Project(
        "mulligan-proof-scale",
        files=("compose.yaml", "compose.scale.yaml"),
        folder=clean_clone(folder) / "docker",
        variables={"MULLIGAN_TAG": "proof"},
    )
    project.run("down", "--volumes")
    with project:
        result = asyncio.run(_spread(project))
        result |= asyncio.run(_check(project, folder / "runs"))
        for service in ("env", "policy"):
            counts = calls(project, service, {"env": "StartEpisode", "policy": "Generate"}[service])
            result[f"{service}_calls"] = counts
            assert len(counts) == result[f"{service}_replicas"] and min(counts.values()) > 0, result
    return result


async def _spread(project: Project) -> dict[str, Any]:
    settings = ("--set", f"steps={SCALE_STEPS}", "--set", "evaluation.every=0", "--set", "evaluation.tasks=4")
    started = project.execute("trainer", "mulligan", "train", RECIPE, "--run-id", RUN, "--no-watch", *settings)
    assert started.returncode == 0, started.stderr
    client = RunClient(project.endpoint("trainer"))
    try:
        await _reached(client, SCALE_STEPS // 4)
        await asyncio.to_thread(project.run, "up", "--wait", "--no-recreate", "--scale", "policy=3")
        joined = await _reached(client, SCALE_STEPS // 2)
        (victim, _) = project.run("ps", "--quiet", "env").stdout.split()
        await asyncio.to_thread(subprocess.run, ["docker", "kill", victim], check=True, capture_output=True)
        await _reached(client, SCALE_STEPS)
        async for _ in client.watch(RUN):
            pass
        info = await client.get(RUN)
    finally:
        await client.close()
    assert info.state is RunState.COMPLETED, f"{info.state}: {info.error}"
    versions = [
        int(project.run("exec", "-T", "--index", str(index), "policy", "python", "-c", VERSION).stdout)
        for index in (1, 2, 3)
    ]
    result = {"env_replicas": 2, "policy_replicas": 3, "third_policy_joined_by_step": joined, "versions": versions}
    assert len(set(versions)) == 1 and versions[0] > SCALE_STEPS, result
    return result


def calls(project: Project, service: str, method: str) -> dict[str, int]:
    """The number of calls of a method that each replica answered."""
    containers = project.run("ps", "--all", "--quiet", service).stdout.split()
    logs = [subprocess.run(["docker", "logs", name], capture_output=True, text=True, check=True) for name in containers]
    counts = [log.stderr.count(f"method={method}") + log.stdout.count(f"method={method}") for log in logs]
    return {f"{service} {number}": count for number, count in enumerate(counts, 1)}


async def _reached(client: RunClient, step: int) -> int:
    """Waits until the run has reached `step`. Returns its step."""
    async with asyncio.timeout(RUN_SECONDS):
        while True:
            info = await client.get(RUN)
            assert info.state in (RunState.RUNNING, RunState.COMPLETED), f"{info.state}: {info.error}"
            if info.step >= step:
                return info.step
            await asyncio.sleep(0.5)


async def _check(project: Project, folder: Path) -> dict[str, Any]:
    """Checks the run's journal: all experiences are there, once, and the memory has the same reflections."""
    shutil.rmtree(folder, ignore_errors=True)
    project.run("cp", f"trainer:/data/runs/{RUN}", str(folder))
    summary = json.loads((folder / "summary.json").read_text())
    journal = folder / "journal"
    chains = [chain for step in journaled_steps(journal) for chain in read_experiences(journal_file(journal, step))]
    solved = [chain.experience_id for chain in chains if is_memorable(chain, threshold=1.0)]
    client = MemoryClient(project.endpoint("memory"))
    memorised = [entry.provenance.experience_id for entry in await client.list(RUN)]
    await client.close()
    rollout = summary["settings"]["rollout"]
    outcomes = [part.outcome for chain in chains for part in chain.samples]
    result = {
        "test_success_before": summary["test_success_before"],
        "test_success_after": summary["test_success_after"],
        "train_seconds": round(summary["train_seconds"]),
        "experiences": len(chains),
        "experiences_expected": summary["steps"] * rollout["tasks_per_step"] * rollout["rollouts_per_task"],
        "counted_twice": len(chains) - len({chain.experience_id for chain in chains}),
        "memory_equals_journal": memorised == solved,
        "excluded": sum(not outcome.has_reward for outcome in outcomes),
        "outcomes": {str(outcome): outcomes.count(outcome) for outcome in Outcome},
        "restarted_attempts": sum(chain["first"].restarts > 0 for chain in chains),
    }
    assert result["experiences"] == result["experiences_expected"] and result["counted_twice"] == 0, result
    assert result["memory_equals_journal"] and result["excluded"] == 0, result
    return result


def clean_clone(folder: Path) -> Path:
    """Clones the current commit and copies the wheels in docker/wheels."""
    problem = missing()
    if problem:
        raise CaseUnavailable(problem)
    shutil.rmtree(folder, ignore_errors=True)
    clone = folder / "clone"
    clone.parent.mkdir(parents=True)
    git("clone", "--quiet", str(ROOT), str(clone))
    for wheel in (ROOT / "docker" / "wheels").glob("*.whl"):
        shutil.copy2(wheel, clone / "docker" / "wheels")
    return clone


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def seconds(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return round(time.monotonic() - start, 1)


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {"docker-run": across_containers, "docker-scale": replicas}
