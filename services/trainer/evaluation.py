"""Evaluation: first attempts, as the policy is deployed: without a reflection in context, unless the run's first
attempts read the memory. Then the protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from statistics import fmean
from typing import Any

from mulligan.common.errors import DomainError, Reason, without_incident
from mulligan.common.experience import Sample, Turn
from mulligan.common.rewards import reaches
from mulligan.common.types import EnvironmentInfo, TaskInfo
from mulligan.trainer.events import EvaluationEvent
from mulligan.trainer.foreign import blaming
from mulligan.trainer.interfaces import PolicyPort
from mulligan.trainer.metrics import rewards_of
from mulligan.trainer.player import Player
from mulligan.trainer.preflight import named_by
from mulligan.trainer.protocols import MOST_ATTEMPTS, PROTOCOLS, ProtocolSettings
from mulligan.trainer.sampling import NamedPolicy
from mulligan.trainer.settings import EvaluationSettings
from mulligan.trainer.step import OUTSIDE

_TURN = Turn("", "", "", 0.0)  # stands for what was said


class EvaluationFailed(RuntimeError):
    """None of an evaluation's attempts could be finished."""


class ProtocolFailed(RuntimeError):
    """A protocol's own code raised, or returned no metrics; the message says which, and has the traceback."""


async def evaluate(player: Player) -> list[Sample]:
    """Plays each task `settings.samples` times. Of each attempt there is what `measure` needs."""
    samples = player.settings.samples
    await player.read()
    player.begin(expected=len(player.tasks) * samples)

    async def attempt(number: int) -> Sample:
        return _measurable(await player.attempt(player.tasks[number // samples], number % samples))

    return await player.each(range(len(player.tasks) * samples), attempt)


def _measurable(attempt: Sample) -> Sample:
    """Without texts: the last attempt of a large evaluation ends while all others are kept."""
    return replace(attempt, turns=attempt.turns and (_TURN,), feedback="", final_observation="")


async def measure(player: Player, step: int, attempts: Sequence[Sample], environment: str = "") -> EvaluationEvent:
    """Averages over the attempts of `evaluate` with a reward. Then runs the protocols. `environment` is empty for the
    run's own.

    Raises EvaluationFailed when no attempt has a reward, and ProtocolFailed.
    """
    rewards = rewards_of(attempts)
    if not rewards:
        # One of each kind, with the incident of one attempt.
        causes = {without_incident(error): error for error in sorted({one.error for one in attempts}, reverse=True)}
        raise EvaluationFailed("no attempt could be finished: " + "; ".join(sorted(causes.values())[:3]))
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


def check_attempts(
    places: Sequence[tuple[EnvironmentInfo, Sequence[TaskInfo]]], settings: EvaluationSettings, within: str = ""
) -> None:
    """Raises DomainError INVALID_SETTING for more attempts than an evaluation, or a protocol in it, may have, and
    ProtocolFailed. `within` begins the field of the error."""
    info, tasks = max(places, key=lambda place: len(place[1]))
    counts = [("samples", settings.samples, 1, "")]
    for index, protocol in enumerate(settings.protocols):
        at = f"protocols[{index}]"
        with blaming(f"protocol {protocol.name!r}", ProtocolFailed):
            name, samples = protocol.samples_per_task
            times = protocol.attempts_per_sample
        several = f", {times} attempts for each sample of {at} ({protocol.name!r})" if times > 1 else ""
        counts.append((f"{at}.{name}", samples, times, several))
    for name, samples, times, several in counts:
        if len(tasks) * samples * times > MOST_ATTEMPTS:
            fitting = MOST_ATTEMPTS // (len(tasks) * times)
            field = f"{within}{name if fitting else 'tasks'}"
            message = (
                f"{field}: expected at most {fitting or MOST_ATTEMPTS // times}, as {len(tasks)} test tasks of "
                f"{info.name!r} are played{several}, and {MOST_ATTEMPTS} attempts are the most; "
                f"got {samples if fitting else len(tasks)}" + (f". Fewer tasks: {within}tasks" if fitting else "")
            )
            raise DomainError(Reason.INVALID_SETTING, message, field=field)


def fit_protocols(
    places: Sequence[tuple[EnvironmentInfo, Sequence[TaskInfo]]], settings: EvaluationSettings, within: str = ""
) -> list[EvaluationSettings]:
    """The settings for each environment and its tasks: with the protocols that it has all for. `within` begins the
    field of an error.

    Raises DomainError INVALID_SETTING for a protocol that fits no environment, with a `field` such as
    `protocols[0].name`, what `check_attempts` raises, and ProtocolFailed.
    """
    check_attempts(places, settings, within)
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
