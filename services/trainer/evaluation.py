"""Evaluation: first attempts, as the policy is deployed: without a reflection in context, unless the run's first
attempts read the memory. Then the protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import fmean
from typing import Any

from mulligan.common.errors import DomainError, Reason
from mulligan.common.experience import Sample
from mulligan.common.rewards import reaches
from mulligan.common.tasks import gather_or_cancel
from mulligan.common.types import EnvironmentInfo, TaskInfo
from mulligan.trainer.events import EvaluationEvent
from mulligan.trainer.foreign import blaming
from mulligan.trainer.interfaces import PolicyPort
from mulligan.trainer.metrics import rewards_of
from mulligan.trainer.player import Player
from mulligan.trainer.preflight import named_by
from mulligan.trainer.protocols import PROTOCOLS, ProtocolSettings
from mulligan.trainer.sampling import NamedPolicy
from mulligan.trainer.settings import EvaluationSettings
from mulligan.trainer.step import OUTSIDE


class EvaluationFailed(RuntimeError):
    """None of an evaluation's attempts could be finished."""


class ProtocolFailed(RuntimeError):
    """A protocol's own code raised, or returned no metrics; the message says which, and has the traceback."""


async def evaluate(player: Player) -> list[Sample]:
    """Plays each task `settings.samples` times."""
    samples = player.settings.samples
    await player.read()
    player.begin(expected=len(player.tasks) * samples)
    return await gather_or_cancel(player.attempt(task, sample) for task in player.tasks for sample in range(samples))


async def measure(player: Player, step: int, attempts: Sequence[Sample], environment: str = "") -> EvaluationEvent:
    """Averages over the attempts of `evaluate` with a reward. Then runs the protocols. `environment` is empty for the
    run's own.

    Raises EvaluationFailed when no attempt has a reward, and ProtocolFailed.
    """
    rewards = rewards_of(attempts)
    if not rewards:
        causes = sorted({attempt.error for attempt in attempts})
        raise EvaluationFailed("no attempt could be finished: " + "; ".join(causes[:3]))
    success = fmean(reaches(reward, player.threshold) for reward in rewards)
    excluded = len(attempts) - len(rewards)
    metrics: dict[str, float] = {}
    for settings in player.settings.protocols:
        metrics |= await _run(player, settings)
    return EvaluationEvent(step, success, fmean(rewards), len(rewards), excluded, metrics, environment)


async def _run(player: Player, settings: ProtocolSettings) -> dict[str, float]:
    """The metrics of one protocol, by LABEL/METRIC."""
    player.begin(settings.prefix)
    with blaming(f"protocol {settings.name!r}", ProtocolFailed, OUTSIDE):
        metrics = await PROTOCOLS.find(settings.name).run(player, player.tasks, settings)
    if problem := _problem(metrics):
        raise ProtocolFailed(f"protocol {settings.name!r} returned {problem}; expected finite numbers by name")
    metrics = {f"{settings.prefix}/{name}": float(value) for name, value in metrics.items()}
    if player.progress.excluded:
        metrics[f"{settings.prefix}/excluded"] = float(player.progress.excluded)
    return metrics


def _problem(metrics: Any) -> str:
    if not isinstance(metrics, Mapping):
        return f"a {type(metrics).__name__}"
    for name, value in metrics.items():
        if not isinstance(name, str) or not isinstance(value, int | float) or not isfinite(value):
            return f"{name!r}: {value!r}"
    return ""


def fit_protocols(
    places: Sequence[tuple[EnvironmentInfo, Sequence[TaskInfo]]], settings: EvaluationSettings, within: str = ""
) -> list[EvaluationSettings]:
    """The settings for each environment and its tasks: with the protocols that it has all for. `within` begins the
    field of an error.

    Raises DomainError INVALID_SETTING for a protocol that fits no environment, with a `field` such as
    `protocols[0].name`, and ProtocolFailed.
    """
    kept: list[list[ProtocolSettings]] = [[] for _ in places]
    for index, protocol in enumerate(settings.protocols):
        lacks = getattr(PROTOCOLS.find(protocol.name), "lacks", lambda *_: "")
        with blaming(f"protocol {protocol.name!r}", ProtocolFailed):
            problems = [lacks(environment, tasks, protocol) for environment, tasks in places]
        if all(problems):
            field = f"{within}protocols[{index}].name"
            message = f"{field}: {protocol.name!r} cannot be measured in {places[0][0].name!r}: {problems[0]}"
            raise DomainError(Reason.INVALID_SETTING, message, field=field)
        for problem, protocols in zip(problems, kept, strict=True):
            if not problem:
                protocols.append(protocol)
    return [settings.model_copy(update={"protocols": tuple(protocols)}) for protocols in kept]


async def open_writers(policies: PolicyPort, settings: EvaluationSettings, within: str = "") -> dict[str, NamedPolicy]:
    """The policies that write texts, by the label of the protocol. `within` begins the field of an error.

    Raises DomainError UNKNOWN_POLICY.
    """
    found = {}
    for index, protocol in enumerate(settings.protocols):
        if writer := getattr(protocol, "writer", ""):
            with named_by(f"{within}protocols[{index}].writer"):
                found[protocol.prefix] = await NamedPolicy.open(policies, writer)
    return found
