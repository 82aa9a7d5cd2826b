"""Settings of the policy service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SecretStr,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mulligan.common.config import ServiceSettings
from mulligan.common.plugins import UnusablePlugin, chosen_settings, place_of, read_table, with_tables
from mulligan.policy.backend import BackendSettings
from mulligan.policy.backends import BACKENDS

S = TypeVar("S", bound=BackendSettings)
PolicyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


@with_tables(BACKENDS)
class ModelSettings(BaseModel):
    """One policy: a model and what runs it. The settings of the default backend stand beside these, those of another
    in a table of its name: `threads = 2`, `[sglang]`."""

    backend: str = Field(
        BACKENDS.default,
        validate_default=True,
        description=f"What runs the model: {', '.join(BACKENDS.built_in)}, one that is installed, or a module.",
    )
    backend_settings: dict[str, JsonValue] = Field(
        {}, validate_default=True, description="Of a backend that has no table of its name, such as any module."
    )
    model: str = Field("embedded", description="Hub id, folder, or `embedded`: the small model that comes along.")
    frozen: bool = Field(False, description="Its weights are never updated: a reference, an opponent.")
    adapters: dict[str, str] = Field(
        {}, description="Fixed LoRA adapters that requests may name: folders, or an endpoint's model names."
    )
    context_length: int = Field(0, ge=0, description="Longest prompt plus completion in tokens; 0: the model's own.")
    max_queue: int = Field(4096, ge=0, description="Requests that wait; more are refused with QUEUE_FULL.")

    @property
    def own(self) -> BackendSettings:
        """The backend's own settings."""
        own: BackendSettings = chosen_settings(self, BACKENDS, self.backend)
        return own

    def own_as(self, kind: type[S]) -> S:
        """The same, by the class that the backend exports."""
        own = self.own
        assert isinstance(own, kind), f"{self.backend} has {type(own).__name__}, not {kind.__name__}"
        return own

    @field_validator("backend")
    @classmethod
    def _exists(cls, backend: str) -> str:
        try:
            BACKENDS.find(backend)
        except UnusablePlugin as error:
            raise PydanticCustomError("plugin", "{problem}", {"problem": str(error)}) from error
        return backend

    @field_validator("backend_settings")
    @classmethod
    def _are_of_the_backend(cls, given: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        backend = info.data.get("backend")
        if backend is None:  # it was refused
            return given
        if place_of(cls, BACKENDS, backend) == f"{BACKENDS.others}.":
            read_table(BACKENDS.find(backend).Settings, given)
        elif given:
            message = "the settings of {backend} have a place of their own"
            raise PydanticCustomError("plugin", message, {"backend": backend})
        return given

    @model_validator(mode="after")
    def _own_are_complete(self) -> Self:
        _ = self.own
        return self

    @property
    def model_name(self) -> str:
        """Hub id or name of a folder, without where the folder is."""
        return Path(self.model).name if Path(self.model).is_dir() else self.model


class PolicyModelSettings(ModelSettings):
    """A further policy, as it stands in the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    upload_gib: float = Field(1024.0, gt=0, description="Uploaded weights that wait for their UpdateWeights, at most.")
    admin_token: SecretStr | None = Field(None, description="When set, PolicyAdminService needs it as bearer token.")
    admin_token_file: Path | None = Field(None, description="File that holds `admin_token`.")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        if self.default_policy in self.policies:
            raise ValueError(f"policies.{self.default_policy}: the default policy is described outside of `policies`")
        return self
