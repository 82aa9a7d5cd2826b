"""Settings of services in which runs have something of their own: the memory service and the trainer."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from mulligan.common.addresses import is_loopback
from mulligan.common.config import ServiceSettings
from mulligan.common.run_credentials import BadKeys, RunGuard, RunKeys


class GuardedSettings(ServiceSettings):
    run_keys: Path | None = Field(
        None,
        description="PEM file with Ed25519 keys. When set, a memory scope and a learner need the credential of their "
        "run, which one of the keys has signed. The first private one signs those of the trainer's runs.",
    )

    @cached_property
    def keys(self) -> RunKeys | None:
        """None if no credentials of runs are needed. Raises BadKeys."""
        return None if self.run_keys is None else RunKeys(self.run_keys)

    @property
    def guard(self) -> RunGuard:
        return RunGuard(self.keys, self.tokens)

    @property
    def warnings(self) -> list[str]:
        if self.run_keys is not None or is_loopback(self.host):
            return super().warnings
        open_ = (
            "run_keys is not set: roles decide alone, and callers can write to each other's scopes, learners and runs"
        )
        return [*super().warnings, open_]

    @model_validator(mode="after")
    def _keys_are_there(self) -> Self:
        try:
            _ = self.keys
        except BadKeys as error:
            raise ValueError(f"run_keys: {error}") from error
        return self
