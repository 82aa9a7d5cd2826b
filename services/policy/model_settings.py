"""Settings of one policy: its model and the backend that runs it. Backends import this module. `config.py` adds the
settings of each backend, and those of the service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self, TypeVar

from pydantic import Field, JsonValue, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mulligan.common.extras import MissingExtra
from mulligan.common.number_settings import NumberSettings
from mulligan.common.plugins import UnusablePlugin, chosen_settings, place_of, read_table
from mulligan.common.suggest import bad_setting
from mulligan.policy.backend import BackendSettings
from mulligan.policy.backends import BACKENDS

S = TypeVar("S", bound=BackendSettings)


class ModelSettings(NumberSettings):
    """The settings that every policy has, with any backend."""

    backend: str = Field(
        BACKENDS.default,
        validate_default=True,
        description=f"What runs the model: {', '.join(BACKENDS.built_in)}, one that is installed, or a module.",
    )
    backend_settings: dict[str, JsonValue] = Field(
        {},
        validate_default=True,
        repr=False,  # there may be credentials among them
        description="Of a backend that has no table of its name, such as any module.",
    )
    model: str = Field(
        "embedded", description="Hub id, folder, or `embedded` or `embedded-symbols`: small models that come along."
    )
    revision: str = Field("", max_length=200, description="Of a hub id: a commit, a tag or a branch.")
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
        """The backend's own settings, as an instance of the class that it exports."""
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
        except MissingExtra as error:
            problem = f"the backend {backend} {error}"
            raise PydanticCustomError("plugin", "{problem}", {"problem": problem}) from error
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
        if self.revision and not self.own.reads_files:
            raise ValueError(f"revision: {self.backend} has models by name alone")
        if found := self.own.unprotected():
            name, problem = found
            raise bad_setting(f"{place_of(type(self), BACKENDS, self.backend)}{name}", problem)
        return self

    @property
    def model_name(self) -> str:
        """Hub id, or the name of the folder without its path."""
        return Path(self.model).name if os.path.isdir(self.model) else self.model
