"""The four services as processes, wired together, and a client for each."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from mulligan.cli.local import free_ports
from mulligan.common.channel import Endpoint
from mulligan.common.experience import Experience
from mulligan.common.rewards import reaches
from mulligan.common.types import Outcome
from mulligan.memory.client import MemoryClient
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from mulligan.trainer.client import RunClient, RunInfo
from mulligan.trainer.events import NoticeEvent, StepEvent
from mulligan.trainer.folder import RunState
from mulligan.trainer.journal import journal_file, journaled_steps, read_experiences
from mulligan.trainer.settings import RunSettings

RUN_SECONDS = 240.0


def small_run(**changes: Any) -> RunSettings:
    """ERL on 3×3 FrozenLake with the embedded model, small enough for a test."""
    plain: dict[str, Any] = {
        "environment": "frozenlake-3x3",
        "steps": 4,
        "checkpoint_every": 2,
        "algorithm": {"optimizer_steps": 2},
        "rollout": {"tasks_per_step": 4, "rollouts_per_task": 2, "max_tokens": 4, "reflection_max_tokens": 32},
        "loss": {"kl_coefficient": 0.0},
        "optimizer": {"learning_rate": 5e-4},
        "evaluation": {"every": 0, "tasks": 4, "samples": 1},
    }
    for name, value in changes.items():
        plain[name] = plain.get(name, {}) | value if isinstance(value, dict) else value
    return RunSettings.model_validate(plain)


def is_memorable(experience: Experience, threshold: float) -> bool:
    """Whether the memory has to take the reflection of an experience of ERL: the second attempt succeeded, and the text
    is complete and not empty."""
    reflection = experience.sample("reflection")
    second = experience.sample("second")
    if reflection is None or reflection.outcome is not Outcome.COMPLETED or not reflection.text:
        return False
    return second is not None and second.reward is not None and reaches(second.reward, threshold)


@dataclass
class Loop:
    folder: Path
    env: ServiceProcess
    policy: ServiceProcess
    memory: ServiceProcess
    trainer: ServiceProcess

    @classmethod
    def start(
        cls, services: ServiceProcesses, folder: Path, *, deterministic: bool = False, **settings: dict[str, Any]
    ) -> Loop:
        """`settings` are further ones of a service: `policy={"state_folder": …}`."""
        weights = folder / "weights"
        weights.mkdir(parents=True, exist_ok=True)
        address = {name: f"127.0.0.1:{port}" for name, port in free_ports().items()}
        common: dict[str, dict[str, Any]] = {
            "env": {},
            "policy": {
                "weights_folder": weights,
                "models_folder": folder,
                "deterministic": deterministic,
                "threads": 1,
            },
            "memory": {"database": folder / "memory.sqlite"},
            "trainer": {
                "runs_folder": folder / "runs",
                "checkpoint_folder": folder / "checkpoints",
                "models_folder": settings.get("policy", {}).get("models_folder", folder),
                "weights_folder": weights,
                "env_address": address["env"],
                "policy_address": address["policy"],
                "memory_address": address["memory"],
                "outage_seconds": 60,
                "threads": 1,
            },
        }
        with ThreadPoolExecutor() as pool:  # all at once: importing torch takes seconds
            started = {
                name: pool.submit(services.start, name, address=address[name], **(values | settings.get(name, {})))
                for name, values in common.items()
            }
        return cls(folder, **{name: process.result() for name, process in started.items()})

    def client(self) -> RunClient:
        return RunClient(Endpoint(self.trainer.address, outage_seconds=60))

    async def train(self, run_id: str, settings: RunSettings, seconds: float = RUN_SECONDS) -> RunInfo:
        """The run, completed within so many seconds."""
        client = self.client()
        try:
            await client.start(run_id, settings)
            return await self.ended(client, run_id, seconds)
        finally:
            await client.close()

    async def ended(self, client: RunClient, run_id: str, seconds: float = RUN_SECONDS) -> RunInfo:
        async with asyncio.timeout(seconds):
            async for _ in client.watch(run_id):
                pass
        info = await client.get(run_id)
        assert info.state is RunState.COMPLETED, f"{info.state}: {info.error}\n{self.trainer.log[-4000:]}"
        return info

    async def journal_grows(self, run_id: str, count: int) -> None:
        """Waits until the run has journaled so many bytes more: it is in the middle of something."""
        start = self._journaled(run_id)
        async with asyncio.timeout(RUN_SECONDS):
            while self._journaled(run_id) < start + count:  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.02)

    def _journaled(self, run_id: str) -> int:
        return sum(path.stat().st_size for path in (self.folder / "runs" / run_id / "journal").glob("*"))

    def experiences(self, run_id: str) -> list[Experience]:
        journal = self.folder / "runs" / run_id / "journal"
        return [chain for step in journaled_steps(journal) for chain in read_experiences(journal_file(journal, step))]

    def weights(self, run_id: str, step: int) -> dict[str, Any]:
        """Of a checkpoint, by their names."""
        folder = self.folder / "checkpoints" / run_id / f"{run_id}-{step:06}"
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return load_file(folder / files["weights"]["file"])

    async def metrics(self, run_id: str) -> list[dict[str, float]]:
        """Of each step."""
        client = self.client()
        try:
            return [e.event.metrics async for e in client.watch(run_id) if isinstance(e.event, StepEvent)]
        finally:
            await client.close()

    async def notices(self, run_id: str) -> list[str]:
        client = self.client()
        try:
            return [e.event.text async for e in client.watch(run_id) if isinstance(e.event, NoticeEvent)]
        finally:
            await client.close()

    async def failure(self, run_id: str) -> str:
        """The error of a run that is to fail."""
        client = self.client()
        try:
            async with asyncio.timeout(RUN_SECONDS):
                async for _ in client.watch(run_id):
                    pass
            info = await client.get(run_id)
        finally:
            await client.close()
        assert info.state is RunState.FAILED
        return info.error

    async def memorised(self, run_id: str) -> list[str]:
        """Experience ids of the scope's reflections, in the order in which they were stored."""
        client = MemoryClient(Endpoint(self.memory.address, outage_seconds=60))
        try:
            return [entry.provenance.experience_id for entry in await client.list(run_id)]
        finally:
            await client.close()
