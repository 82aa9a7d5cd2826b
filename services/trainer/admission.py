"""What callers of StartRun may ask for, and the credential that they get for a new run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mulligan import models
from mulligan.common.errors import DomainError, Reason
from mulligan.common.run_credentials import RunGrant, RunGuard, RunKeys
from mulligan.trainer.metric_writers import check_writers
from mulligan.trainer.recall import GLOBAL_SCOPE, scope_of
from mulligan.trainer.settings import RunSettings


@dataclass(frozen=True)
class RunAdmission:
    """`keys` sign credentials that count for `credential_seconds`; without a private key there are none. `guard` knows
    what the caller has. With `checks_models`, models to train are hub ids or below `models_folder`."""

    guard: RunGuard = RunGuard()
    keys: RunKeys | None = None
    credential_seconds: float = 24 * 3600.0
    checks_models: bool = False
    models_folder: Path | None = None

    def check(self, context: Any, run_id: str, settings: RunSettings) -> None:
        """Raises DomainError INVALID_SETTING for a model in another place or a metric writer that is not there, and
        RUN_CREDENTIAL for a scope of the memory that is neither the run's own nor one that runs share: the trainer
        would write to it."""
        check_writers(settings.tracking.writers)
        source = settings.model.source
        checked = self.checks_models and settings.trains
        if checked and (problem := models.problem_of_place(source, self.models_folder)):
            raise DomainError(Reason.INVALID_SETTING, f"model.source: {problem}", field="model.source")
        scope = scope_of(settings, run_id)
        if scope not in (run_id, GLOBAL_SCOPE, f"environment/{settings.environment}"):
            self.guard.check_scopes(context, scope)

    def credential(self, context: Any, run_id: str, settings: RunSettings, *, new: bool) -> str:
        """The run's, for who started it, and for others that have one or are administrators; otherwise empty."""
        if self.keys is None or not self.keys.can_sign or not (new or self.guard.allows_learner(context, run_id)):
            return ""
        return self.keys.sign(RunGrant(run_id, (scope_of(settings, run_id),)), self.credential_seconds)
