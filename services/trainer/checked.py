"""What a run asks its services before it has a learner: on a GPU, that is a loaded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mulligan.common.inference import PolicyInfo
from mulligan.trainer.evaluation import fit_protocols, open_writers
from mulligan.trainer.interfaces import PolicyPort
from mulligan.trainer.preflight import (
    check_algorithm,
    check_environment,
    check_other,
    check_sampling,
    check_trainable,
    named_by,
)
from mulligan.trainer.run_environment import RunTasks
from mulligan.trainer.sampling import NamedPolicy
from mulligan.trainer.settings import ALGORITHMS, EvaluationSettings, RunSettings


@dataclass(frozen=True)
class CheckedRun:
    """What the checks found. `speakers` are the other policies that write texts, by their purposes; `evaluations` has
    the settings for each environment of the run, in order; `writers` are the policies that write for a protocol."""

    speakers: Mapping[str, NamedPolicy]
    evaluations: Sequence[EvaluationSettings]
    writers: Mapping[str, NamedPolicy]


async def check_run(policies: PolicyPort, settings: RunSettings, tasks: Mapping[str, RunTasks]) -> CheckedRun:
    """All checks that need no learner. Raises DomainError INVALID_SETTING or UNKNOWN_POLICY."""
    actor = (await open_served(policies, settings, "actor")).info
    for name, field in settings.environments.items():
        check_environment(tasks[name].info, actor, field)
    speakers = await _speakers(policies, settings, actor)
    if settings.trains and settings.policies.evaluator:
        check_evaluator((await open_served(policies, settings, "evaluator")).info, actor)
    for known in tasks.values():
        check_algorithm(settings.algorithm.name, ALGORITHMS.find(settings.algorithm.name), known.info, actor, speakers)
    places = [(known.info, known.test) for known in tasks.values()]
    fitting = fit_protocols(places, settings.evaluation, "evaluation.")
    return CheckedRun(speakers, fitting, await open_writers(policies, settings.evaluation, "evaluation."))


async def open_served(policies: PolicyPort, settings: RunSettings, purpose: str) -> NamedPolicy:
    """The policy that the run trains, or only plays without a learner; or its evaluator. Raises DomainError
    INVALID_SETTING or UNKNOWN_POLICY."""
    field = f"policies.{purpose}"
    with named_by(field):
        found = await NamedPolicy.open(policies, getattr(settings.policies, purpose))
    if settings.trains:
        check_trainable(found.info, settings, field)
    else:
        check_sampling(found.info, settings)
    return found


def check_evaluator(info: PolicyInfo, actor: PolicyInfo) -> None:
    check_other("evaluator", info, actor, "training waits for evaluations")


async def _speakers(policies: PolicyPort, settings: RunSettings, actor: PolicyInfo) -> dict[str, NamedPolicy]:
    """The other policies that write texts. Raises DomainError INVALID_SETTING or UNKNOWN_POLICY."""
    found = {}
    for purpose in ("reflector", "judge"):
        if name := getattr(settings.policies, purpose):
            with named_by(f"policies.{purpose}"):
                found[purpose] = await NamedPolicy.open(policies, name)
            check_other(purpose, found[purpose].info, actor, "the actor writes and learns to")
    return found
