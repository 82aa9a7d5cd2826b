"""Callers of the trainer's run service that vanish: a case for each call that changes or measures something, and for
watches. The ports of the trainer are fakes that wait a turn of the event loop in each call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mulligan.common.inference import CallOptions, Completion, Prompt, PublishedWeights, SamplingParams
from mulligan.common.types import EpisodeStep
from mulligan.trainer import servicer
from mulligan.trainer.folder import RunState
from mulligan.trainer.manager import RunManager
from mulligan.trainer.run import ServicePorts
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.v1 import run_config_pb2 as config_pb
from mulligan.trainer.v1 import run_service_pb2 as pb
from mulligan.trainer.v1 import run_service_pb2_grpc as pb_grpc
from mulligan.trainer.wire import settings_to_proto, validated
from tests.support.fakes import FakeEnvironment, FakeEpisode, FakeLearner, FakeMemory, FakePolicy
from tests.support.vanishing import Case, Vanishing, at_each_wait, vanishing
from tests.support.waiting import until


@dataclass
class _WaitingEnvironment(FakeEnvironment):
    """`open` are the episodes that are neither over nor ended."""

    open: set[str] = field(default_factory=set)

    async def start(self, environment: str, task_id: str, episode_id: str) -> FakeEpisode:
        await asyncio.sleep(0)
        self.open.add(episode_id)
        return _WaitingEpisode(self, task_id, episode_id)


class _WaitingEpisode(FakeEpisode):
    environment: _WaitingEnvironment

    async def step(self, action: str) -> EpisodeStep:
        await asyncio.sleep(0)
        step = await super().step(action)
        if step.done:
            self.environment.open.discard(self.episode_id)
        return step

    async def end(self) -> None:
        await asyncio.sleep(0)
        self.environment.open.discard(self.episode_id)


class _WaitingPolicy(FakePolicy):
    """`go_on` is clear: nobody is answered. `asking` counts those that wait."""

    def __init__(self) -> None:
        super().__init__(lambda system, last, sampling: "go")
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.asking = 0

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = CallOptions()
    ) -> Completion:
        self.asking += 1
        try:
            await asyncio.sleep(0)
            await self.go_on.wait()
            return await super().generate(prompt, sampling, options)
        finally:
            self.asking -= 1

    async def update_weights(self, weights: PublishedWeights, policy: str = "") -> float | None:
        await asyncio.sleep(0)
        return await super().update_weights(weights, policy)


class _WaitingLearner(FakeLearner):
    """Of the runs of a `_Trainer`, which share the checkpoints, and one of which is open at most."""

    def __init__(self, its: _Trainer) -> None:
        super().__init__()
        self.checkpoints = its.checkpoints
        self._its = its
        its.learners += 1
        assert its.learners == 1, "a learner was not closed"

    async def load_checkpoint(self, name: str) -> None:
        await asyncio.sleep(0)
        await super().load_checkpoint(name)

    async def publish_weights(self, policy_version: int, keep: Collection[int] = ()) -> PublishedWeights:
        await asyncio.sleep(0)
        return await super().publish_weights(policy_version, keep)

    async def close(self) -> None:
        await asyncio.sleep(0)
        self._its.learners -= 1


class _Trainer:
    def __init__(self, folder: Path):
        self.environment = _WaitingEnvironment({"t0": "go", "t1": "go"}, turns=2)
        self.policy = _WaitingPolicy()
        self.checkpoints: dict[str, int] = {}
        self.learners = 0  # that are open
        self.number = 0
        ports = ServicePorts(self.environment, self.policy, FakeMemory(), self._open_learner)
        self.manager = RunManager(folder / "runs", ports)
        self.stub: pb_grpc.RunServiceStub

    async def _open_learner(self, run_id: str, settings: RunSettings) -> FakeLearner:
        await asyncio.sleep(0)
        return _WaitingLearner(self)

    @property
    def run_id(self) -> str:
        return f"r{self.number}"

    async def start(self, steps: int = 1) -> pb.Run:
        return (await self.stub.StartRun(_start(self.run_id, steps))).run

    async def stop(self) -> None:
        await self.stub.StopRun(pb.StopRunRequest(run_id=self.run_id))
        await self.ended()
        assert self.manager.record(self.run_id).state is RunState.STOPPED

    async def ended(self) -> None:
        await until(lambda: self.manager.record(self.run_id).state is not RunState.RUNNING)
        await until(lambda: self.learners == 0)
        assert self.manager.record(self.run_id).error == ""

    async def nothing_is_played(self) -> None:
        await until(lambda: self.policy.asking == 0 and not self.environment.open)
        await until(lambda: self.learners == 0 and self.manager._busy_with == "")


def _start(run_id: str, steps: int) -> pb.StartRunRequest:
    settings = validated(
        RunSettings,
        {
            "environment": "fake",
            "steps": steps,
            "algorithm": {"name": "rlvr"},
            "rollout": {"tasks_per_step": 1, "rollouts_per_task": 2},
            "evaluation": {"every": 0, "samples": 1},
        },
    )
    return pb.StartRunRequest(run_id=run_id, config=settings_to_proto(settings))


@asynccontextmanager
async def _serving(folder: Path, caller: Vanishing) -> AsyncIterator[_Trainer]:
    its = _Trainer(folder)
    async with vanishing(lambda server: servicer.add_to_server(server, its.manager), caller) as (_, channel):
        its.stub = pb_grpc.RunServiceStub(channel)
        yield its
    await its.manager.close()


_LONG = 100_000  # steps of a run that is stopped


async def start_run(folder: Path, caller: Vanishing) -> None:
    async def begun(answer: Any) -> None:
        again = await its.start(_LONG)
        assert again.state == pb.RUN_STATE_RUNNING
        assert its.manager.run_ids() == [f"r{number}" for number in range(its.number, -1, -1)], "one run of each call"
        await its.stop()
        its.number += 1

    async with _serving(folder, caller) as its:
        await at_each_wait(caller, lambda: its.stub.StartRun(_start(its.run_id, _LONG)), begun)


async def stop_run(folder: Path, caller: Vanishing) -> None:
    async def stopped(answer: Any) -> None:
        await its.stop()
        its.number += 1
        await its.start(_LONG)

    async with _serving(folder, caller) as its:
        await its.start(_LONG)
        await at_each_wait(caller, lambda: its.stub.StopRun(pb.StopRunRequest(run_id=its.run_id)), stopped)
        await its.stop()


async def resume_run(folder: Path, caller: Vanishing) -> None:
    async def resumed(answer: Any) -> None:
        again = await its.stub.ResumeRun(pb.ResumeRunRequest(run_id=its.run_id))
        assert again.run.state == pb.RUN_STATE_RUNNING and its.manager._busy_with == ""
        await its.stop()

    async with _serving(folder, caller) as its:
        await its.start(_LONG)
        await its.stop()
        await at_each_wait(caller, lambda: its.stub.ResumeRun(pb.ResumeRunRequest(run_id=its.run_id)), resumed)


def _evaluation(run_id: str) -> pb.EvaluateRequest:
    config = config_pb.EvaluationConfig(tasks=2, samples=2)
    return pb.EvaluateRequest(environment="fake", config=config, run_id=run_id)


async def evaluate(folder: Path, caller: Vanishing) -> None:
    """Of a run, whose learner is opened to publish its last checkpoint."""
    await _evaluated(folder, caller, streams=False)


async def stream_evaluate(folder: Path, caller: Vanishing) -> None:
    await _evaluated(folder, caller, streams=True)


async def _evaluated(folder: Path, caller: Vanishing, *, streams: bool) -> None:
    async def left(answer: Any) -> None:
        await its.nothing_is_played()
        if answer is not None:
            result = answer[-1].result if streams else answer
            assert result.result.attempts == 4 and result.result.excluded == 0

    def call() -> Any:
        request = _evaluation(its.run_id)
        return (
            its.stub.StreamEvaluate(pb.StreamEvaluateRequest(request=request))
            if streams
            else its.stub.Evaluate(request)
        )

    async with _serving(folder, caller) as its:
        await its.start()
        await its.ended()
        for caller.in_turns in (False, True):
            await at_each_wait(caller, call, left)


async def watch_run(folder: Path, caller: Vanishing) -> None:
    """First of a run that waits for its policy, then of one that has ended."""
    watches = 0

    async def nobody_watches(answer: Any) -> None:
        nonlocal watches
        watches += 1
        events = its.manager.run(its.run_id).events
        await until(lambda: not events._changed._event._waiters)
        if watches == 4:
            its.policy.go_on.set()
            await its.ended()
        if answer is not None:
            assert [message.event.number for message in answer] == list(range(1, len(answer) + 1))

    async with _serving(folder, caller) as its:
        its.policy.go_on.clear()
        await its.start()
        await until(lambda: its.policy.asking > 0)
        await at_each_wait(caller, lambda: its.stub.WatchRun(pb.WatchRunRequest(run_id=its.run_id)), nobody_watches)


_SERVICE = "/mulligan.trainer.v1.RunService/"
CASES: dict[str, Case] = {
    f"{_SERVICE}StartRun": start_run,
    f"{_SERVICE}StopRun": stop_run,
    f"{_SERVICE}ResumeRun": resume_run,
    f"{_SERVICE}Evaluate": evaluate,
    f"{_SERVICE}StreamEvaluate": stream_evaluate,
    f"{_SERVICE}WatchRun": watch_run,
}
