"""The four services in the test's own process, over real gRPC with tokens and credentials of runs, and their calls as
the judge sees them.

What kills processes, fills disks and moves clocks is in `mulligan.testing.judge.cluster`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from mulligan.common.access import AccessRole
from mulligan.common.channel import Endpoint
from mulligan.common.run_credentials import OWN_SECONDS, RunGrant, RunGuard, RunKeys
from mulligan.common.server import RequestInterceptor
from mulligan.common.tokens import KnownTokens
from mulligan.env import replicas as env_replicas
from mulligan.env import servicer as env_servicer
from mulligan.env.config import EnvSettings
from mulligan.env.episodes import EpisodeTable, StepAnswer, StepRequest
from mulligan.env.workers import WorkerPool
from mulligan.memory import servicer as memory_servicer
from mulligan.memory.client import MemoryClient
from mulligan.memory.stores import sqlite
from mulligan.policy import replicas as policy_replicas
from mulligan.policy import servicer as policy_servicer
from mulligan.policy.client import PolicyClient
from mulligan.policy.config import PolicySettings
from mulligan.policy.policies import Policies
from mulligan.testing.judge import history, recorder
from mulligan.testing.judge.final import collect
from mulligan.testing.judge.history import BrokenRule, RecordedCall
from mulligan.testing.judge.intruders import Intruders
from mulligan.testing.judge.network import CallFaults, FaultyCalls
from mulligan.testing.judge.replayed import ReplayedLearner
from mulligan.testing.judge.state import Final
from mulligan.testing.judge.strangers import Strangers
from mulligan.testing.judge.trial import judged_run
from mulligan.testing.judge.verdict import judge
from mulligan.trainer import servicer as run_servicer
from mulligan.trainer.admission import RunAdmission
from mulligan.trainer.client import RunClient
from mulligan.trainer.interfaces import LearnerPort, MemoryPort
from mulligan.trainer.learner import servicer as learner_servicer
from mulligan.trainer.learner.client import LearnerClient
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerSpec
from mulligan.trainer.manager import RunManager
from mulligan.trainer.run import ServicePorts
from mulligan.trainer.settings import RunSettings
from tests.support.run_keys import write_keys
from tests.support.tokens import token_of, write_tokens

RUN_SECONDS = 60.0
REPEATED = frozenset(
    {
        *("StartEpisodes", "StepEpisodes", "StepEpisode", "AddReflection", "AddReflections", "ReportOutcome"),
        *("ForwardBackward", "OptimStep"),
    }
)
FAULTS = CallFaults(late_copies=0.1, late=0.1, overtaking=0.02, delay=0.01, lost_once=REPEATED)


def short_run(**changes: Any) -> RunSettings:
    rollout = {"tasks_per_step": 2, "rollouts_per_task": 2, "max_restarts": 3}
    return judged_run(**({"steps": 2, "rollout": rollout} | changes))


@dataclass
class World:
    folder: Path
    table: EpisodeTable
    networks: list[FaultyCalls]
    clients: tuple[RunClient, PolicyClient, MemoryClient]
    environments: dict[str, Any]
    strangers: Strangers
    final: Final | None = None
    calls: list[RecordedCall] = field(default_factory=list)

    async def run(self, settings: RunSettings, lose_episodes: int = 0) -> list[BrokenRule]:
        """The verdict on a run. The env server loses so many episodes."""
        self._lose(lose_episodes)
        runs = self.clients[0]
        trying = asyncio.create_task(self.strangers.try_on())
        try:
            async with asyncio.timeout(RUN_SECONDS):
                await runs.start("judged", settings)
                async for _ in runs.watch("judged"):
                    pass
        finally:
            trying.cancel()
        for network in self.networks:
            network.calm = True
        folders = (self.folder / "runs", self.folder / "checkpoints")
        self.final = await collect("judged", settings, folders, self.clients)
        self.calls = history.read(self.folder / "history")
        replayed = partial(ReplayedLearner, self.folder / "replayed")
        return judge(self.calls, self.final, self.environments, replayed)

    def _lose(self, episodes: int) -> None:
        """So many first attempts of training are lost before their second step."""
        step = self.table.step
        left = episodes

        async def losing(requests: Sequence[StepRequest], max_wait: float | None = None) -> list[StepAnswer | None]:
            nonlocal left
            for one in requests:
                if left and "-first-" in one.episode_id and one.step_index == 1 and one.episode_id in self.table._live:
                    del self.table._live[one.episode_id]
                    left -= 1
            return await step(requests, max_wait)

        self.table.step = losing  # type: ignore[method-assign]


@contextmanager
def patched() -> Iterator[Callable[[object, str, Any], None]]:
    """Replaces attributes until the end of the block."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch.setattr


@asynccontextmanager
async def world(folder: Path, seed: int = 0, faults: CallFaults = FAULTS) -> AsyncIterator[World]:
    folder.joinpath("weights").mkdir(parents=True)
    write_tokens(folder)
    chance = random.Random(seed)
    async with AsyncExitStack() as stack:
        patch = stack.enter_context(patched())
        recording = recorder.CallRecorder(recorder.to_file(folder / "history" / "all.jsonl"), "process")
        recorder.record_calls(recording, patch)
        services = _Services(folder, stack, chance, faults)
        table_of = {"frozenlake-3x3": EnvSettings().environments["frozenlake-3x3"]}  # others take seconds to make
        environments = EnvSettings(environments=table_of).create_environments()
        workers = WorkerPool(4, 10.0, 4)
        stack.callback(workers.close)
        table = EpisodeTable(environments, workers)
        env = await services.serve(lambda server: env_servicer.add_to_server(server, table))
        policies = await Policies.open(
            PolicySettings.model_validate(
                {"threads": 1, "weights_folder": folder / "weights", "state_folder": folder / "policy"}
            )
        )
        stack.push_async_callback(policies.close)
        policy = await services.serve(lambda server: policy_servicer.add_to_server(server, policies))
        store = await sqlite.open(str(folder / "memory.sqlite"), sqlite.Settings())
        stack.push_async_callback(store.close)
        guard = services.guard
        memory = await services.serve(lambda server: memory_servicer.add_to_server(server, store, guard=guard))
        trainer = await services.train(env, policy, memory)
        clients = (
            RunClient(replace(services.direct(trainer), run_credential=services.credential_of("judged"))),
            PolicyClient(services.direct(policy)),
            MemoryClient(services.direct(memory)),
        )
        for client in clients:
            stack.push_async_callback(client.close)
        names = {services.targets[address]: served for address, served in services.served.items()}
        tokens: dict[AccessRole, str] = {role: token_of(role) for role in AccessRole if role is not AccessRole.ADMIN}
        intruders = Intruders("judged", token_of(AccessRole.TRAINER), services.keys, chance)
        strangers = Strangers(names, tokens, recording, chance, intruders, pause=0.02)
        yield World(folder, table, services.networks, clients, environments, strangers)


class _Services:
    """Servers, each behind a network of its own."""

    def __init__(self, folder: Path, stack: AsyncExitStack, chance: random.Random, faults: CallFaults):
        self._folder = folder
        self._stack = stack
        self._chance = chance
        self._faults = faults
        self.networks: list[FaultyCalls] = []
        self.targets: dict[str, str] = {}  # of the servers, by the addresses of their networks
        self.served: dict[str, list[str]] = {}
        self.keys = RunKeys(write_keys(folder)[0])
        self.tokens = KnownTokens(folder / "tokens")
        self.guard = RunGuard(self.keys, self.tokens)

    def credential_of(self, run_id: str) -> Callable[[], str]:
        return lambda: self.keys.sign(RunGrant(run_id, (run_id,)), OWN_SECONDS)

    def direct(self, address: str) -> Endpoint:
        return Endpoint(self.targets[address], token=token_of(AccessRole.TRAINER), outage_seconds=10)

    def endpoint(self, address: str) -> Endpoint:
        return Endpoint(address, token=token_of(AccessRole.TRAINER), outage_seconds=10)

    async def serve(self, add: Callable[[grpc.aio.Server], list[str]]) -> str:
        """The address of the network."""
        server = grpc.aio.server(interceptors=[RequestInterceptor(self.tokens)])
        served = add(server)
        target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._stack.push_async_callback(server.stop, None)
        network = FaultyCalls(lambda: target, self._faults, random.Random(self._chance.random()))
        await network.start()
        self._stack.push_async_callback(network.stop)
        self.networks.append(network)
        self.targets[network.address] = target
        self.served[network.address] = served
        return network.address

    async def train(self, env: str, policy: str, memory: str) -> str:
        own = ""

        def notice(text: str) -> None:
            manager.notice(text)

        async def open_learner(run_id: str, settings: RunSettings) -> LearnerPort:
            spec = LearnerSpec(settings.model, settings.optimizer, settings.seed)
            endpoint = replace(self.endpoint(own), run_credential=self.credential_of(run_id))
            return await LearnerClient.create(endpoint, run_id, run_id, spec, notice)

        def memory_of(run_id: str, scope: str) -> MemoryPort:
            return memory_client.with_run_credential(self.credential_of(run_id))

        memory_client = MemoryClient(self.endpoint(memory), on_outage=notice)
        ports = ServicePorts(
            env_replicas.connect(self.endpoint(env), lost_seconds=1.0, on_outage=notice),
            policy_replicas.connect(self.endpoint(policy), on_outage=notice),
            memory_client,
            open_learner,
            memory_of=memory_of,
        )
        manager = RunManager(self._folder / "runs", ports)
        settings = LearnerServerSettings(self._folder / "weights", self._folder / "checkpoints", threads=1)
        learners = learner_servicer.LearnerServicer(settings, guard=self.guard)
        for port in (ports.environment, ports.policy, ports.memory):
            self._stack.push_async_callback(port.close)  # type: ignore[union-attr]
        self._stack.push_async_callback(learners.close)
        self._stack.push_async_callback(manager.close)

        def add(server: grpc.aio.Server) -> list[str]:
            return [
                *run_servicer.add_to_server(server, manager, RunAdmission(self.guard, self.keys)),
                *learner_servicer.add_to_server(server, learners),
            ]

        own = await self.serve(add)
        return own
