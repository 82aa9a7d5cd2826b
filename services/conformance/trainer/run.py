"""Runs the trainer suite against a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mulligan.conformance.report import Report, Result, run_suite
from mulligan.conformance.target import CheckSession, Target
from mulligan.conformance.trainer import SERVER, TRAINER
from mulligan.conformance.trainer.held import Trainer, TrainerOptions
from mulligan.conformance.trainer.server import FIRST
from mulligan.trainer.v1 import learner_service_pb2 as learner_pb
from mulligan.trainer.v1 import learner_service_pb2_grpc as learner_grpc
from mulligan.trainer.v1 import run_config_pb2 as config_pb
from mulligan.trainer.v1 import run_service_pb2_grpc as run_grpc


def target(address: str, **options: Any) -> Target:
    return Target(address, run_grpc.RunServiceStub, learner_grpc.LearnerServiceStub, **options)


def smallest(environment: str, model: str) -> config_pb.RunConfig:
    """One step of two tasks, two attempts each, few tokens, no evaluation in between."""
    return config_pb.RunConfig(
        environment=environment,
        model=learner_pb.ModelConfig(source=model),
        steps=1,
        rollout=config_pb.RolloutConfig(tasks_per_step=2, rollouts_per_task=2, max_tokens=8, reflection_max_tokens=32),
        loss=learner_pb.LossConfig(kl_coefficient=0.0),
        evaluation=config_pb.EvaluationConfig(every=0, tasks=1, samples=1),
    )


async def check(
    target: Target,
    options: TrainerOptions,
    *,
    only: str = "",
    on_result: Callable[[Result], None] = lambda result: None,
) -> Report:
    """Raises TargetUnreachable."""
    await target.connect(*FIRST)
    report = Report("trainer", target.address)
    await run_suite(report, SERVER, CheckSession(target), only=only, on_result=on_result)
    await run_suite(report, TRAINER, Trainer(CheckSession(target), options), only=only, on_result=on_result)
    return report
