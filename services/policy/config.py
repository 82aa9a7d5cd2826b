"""Settings of the policy service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import ConfigDict, Field, StringConstraints, field_validator, model_validator

from mulligan.common.config import ServiceSettings
from mulligan.common.http_keys import userinfo_problem
from mulligan.common.plugins import with_tables
from mulligan.policy.backends import BACKENDS
from mulligan.policy.model_settings import ModelSettings

POLICY_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
PolicyName = Annotated[str, StringConstraints(pattern=POLICY_NAME)]


@with_tables(BACKENDS)
class PolicyModelSettings(ModelSettings):
    """A further policy, as it stands in the settings. The settings of the default backend stand beside these, those of
    another in a table of its name: `threads = 2`, `[another]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@with_tables(BACKENDS)
class PolicySettings(ModelSettings, ServiceSettings):
    """Its own fields describe the default policy; `policies` adds others by name."""

    service: ClassVar[str] = "policy"

    default_policy: PolicyName = Field("actor", description="Name of the policy described here.")
    policies: dict[PolicyName, PolicyModelSettings] = Field({}, description="Further policies: [policies.reference] …")
    weights_folder: Path | None = Field(
        None, description="UpdateWeights loads from below this folder only; without it, from uploads alone."
    )
    models_folder: Path | None = Field(
        None, description="LoadModel loads folders from below this one only; without it, hub ids alone."
    )
    allowed_addresses: tuple[str, ...] = Field(
        (),
        description="Addresses of servers that LoadModel may name, such as https://example.com/v1: prompts go there. "
        "These settings may name any.",
    )
    state_folder: Path | None = Field(
        None, description="Where versions, uploads and loaded models survive a restart; without it nothing does."
    )
    keep_versions: int = Field(3, ge=1, le=1000, description="Versions of each policy that Rollback can serve again.")
    canary_tolerance: float = Field(
        0.0,
        ge=0,
        description="Largest difference to the trainer's log-probabilities; 0: 0.001 in float32, 0.25 in less.",
    )
    session_idle_seconds: float = Field(
        60.0, gt=0, description="A replaced model is closed when none of its sessions has asked for so long."
    )
    max_models: int = Field(
        32, ge=1, description="Models at a time, of all policies; one that is being replaced counts until it is closed."
    )
    upload_gib: float = Field(1024.0, gt=0, description="Uploaded weights that wait for their UpdateWeights, at most.")
    upload_spare_gib: float = Field(
        0.25, ge=0, description="Uploads leave so much of the disk free, for the records of versions."
    )
    upload_stall_seconds: float = Field(
        60.0, gt=0, description="An upload of which less than 1 MiB comes within this time is given up."
    )

    @field_validator("allowed_addresses")
    @classmethod
    def _hold_no_credentials(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for problem in filter(None, map(userinfo_problem, addresses)):
            raise ValueError(problem)
        return addresses

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        if self.default_policy in self.policies:
            raise ValueError(f"policies.{self.default_policy}: the default policy is described outside of `policies`")
        return self
