"""What callers of StartRun may ask for, and the credential that they get for a new run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mulligan import models
from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.run_credentials import RunGrant, RunGuard, RunKeys
from mulligan.trainer.learner.settings import LearnerUse
from mulligan.trainer.metric_writers import check_writers
from mulligan.trainer.recall import GLOBAL_SCOPE, scope_of
from mulligan.trainer.settings import RunSettings

T = TypeVar("T")
_LOOK_SECONDS = 10.0  # for another service to say what there is of a name
_UNTOLD = (
    "; the server at learner_address does not say whether it has checkpoints with this id, so a new run needs that "
    "credential: `mulligan token` prints one. A server of this release does say it"
)


@dataclass(frozen=True)
class NamesInUse:
    """Knows what others have of a name that a new run would get: what `snapshot` says of the scope of the memory, and
    `learner_use` of learners."""

    snapshot: Callable[[str], Awaitable[int]]
    learner_use: Callable[[str], Awaitable[LearnerUse]]

    async def has_entries(self, scope: str) -> bool:
        """Raises DomainError SERVICE_UNAVAILABLE, as `of_learner` does."""
        return await _looked("memory", self.snapshot(scope)) > 0

    async def of_learner(self, learner_id: str) -> LearnerUse:
        return await _looked("learner", self.learner_use(learner_id))


async def _looked(service: str, asked: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(_LOOK_SECONDS):
            return await asked
    except (ServiceUnavailable, CallFailed, DomainError, TimeoutError) as error:
        said = str(error) or f"no answer within {_LOOK_SECONDS:g} s"
        message = f"whether the run's id is in use cannot be seen: the {service} service does not say: {said}"
        raise DomainError(Reason.SERVICE_UNAVAILABLE, message, endpoint=service) from error


@dataclass(frozen=True)
class RunAdmission:
    """`keys` sign credentials that count for `credential_seconds`; without a private key there are none. `guard` knows
    what the caller has. With `checks_models`, models to train are hub ids or below `models_folder`."""

    guard: RunGuard = RunGuard()
    keys: RunKeys | None = None
    credential_seconds: float = 24 * 3600.0
    checks_models: bool = False
    models_folder: Path | None = None
    in_use: NamesInUse | None = None
    insecure: bool = False  # metric writers may send keys to other machines without TLS

    async def check(self, context: Any, run_id: str, settings: RunSettings) -> None:
        """Raises DomainError INVALID_SETTING for a model in another place or a metric writer that cannot be used, and
        RUN_CREDENTIAL for a scope of the memory that is neither the run's own nor one that runs share: the trainer
        would write to it. Where callers need credentials, an id that names what others have is RUN_CREDENTIAL, too: the
        run's credential would be good for that.

        What others write first after the memory's answer is as if they wrote after the run had started: the name was
        free when it was given out. A second look after the start would move that moment, and not do away with it, since
        a name is taken by its first entry alone; and it could not tell their entry from the run's own."""
        check_writers(settings.tracking.writers, insecure=self.insecure)
        source = settings.model.source
        checked = self.checks_models and settings.trains
        if checked and (problem := models.problem_of_place(source, self.models_folder)):
            raise DomainError(Reason.INVALID_SETTING, f"model.source: {problem}", field="model.source")
        scope = scope_of(settings, run_id)
        if scope not in (run_id, GLOBAL_SCOPE, f"environment/{settings.environment}"):
            self.guard.check_scopes(context, scope)
        if scope == run_id and not self.guard.allows_scope(context, scope):
            await self._refuse_scope_of_others(context, scope)
        if not self.guard.allows_learner(context, run_id):
            await self._refuse_learner_of_others(context, run_id)

    async def _refuse_scope_of_others(self, context: Any, scope: str) -> None:
        if self.in_use is not None and await self.in_use.has_entries(scope):
            self.guard.check_scopes(context, scope, why=_taken("the scope of the memory with this name has entries"))

    async def _refuse_learner_of_others(self, context: Any, run_id: str) -> None:
        use = LearnerUse.FREE if self.in_use is None else await self.in_use.of_learner(run_id)
        if use is LearnerUse.IN_USE:
            self.guard.check_learner(context, run_id, why=_taken("there is such a learner, or a checkpoint of it"))
        if use is LearnerUse.UNTOLD:
            self.guard.check_learner(context, run_id, why=_UNTOLD)

    def credential(self, context: Any, run_id: str, settings: RunSettings, *, new: bool) -> str:
        """The run's, for who started it, and for others that have one or are administrators; otherwise empty."""
        if self.keys is None or not self.keys.can_sign or not (new or self.guard.allows_learner(context, run_id)):
            return ""
        return self.keys.sign(RunGrant(run_id, (scope_of(settings, run_id),)), self.credential_seconds)


def _taken(found: str) -> str:
    return f"; {found} already, so a new run needs another run_id, or that credential"
