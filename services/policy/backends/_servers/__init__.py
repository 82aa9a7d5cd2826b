"""What the backends for servers reached over HTTP share: SGLang and vLLM.

This is not a backend itself. Each of the two adds its own part: requests and answers, what a server can do, and the
calls that change it. `open_servers` finds or launches the servers. For a request, `ServersBackend` picks a server of
the `ServerPool`, has the engine's subclass ask it, and asks another when that one fails. For an update, the pool has
every `EngineServer` load the `TargetWeights` that `Folders` has put on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from mulligan.common.suggest import bad_setting
from mulligan.policy.backend import HttpSettings
from mulligan.policy.backends._servers.flags import check_flags
from mulligan.policy.key_file import KeyFile, read_key


class ServerSettings(HttpSettings):
    """Servers that run at `servers`. If none are named, this service launches and supervises some."""

    local_only: ClassVar = HttpSettings.local_only | frozenset(
        {"python", "flags", "environment", "api_key_file", "folder", "folder_in_engine"}
    )
    exclusive: ClassVar = frozenset({"servers"})
    # Flags of the engine that have a secret, and what to do in their place.
    secret_flags: ClassVar[Mapping[str, str]] = {
        "--api-key": "set api_key_file",
        "--hf-token": "set the variable HF_TOKEN_PATH of this service to a file with it",
        "--ssl-keyfile-password": "give --ssl-keyfile a key without a password",
    }

    servers: tuple[str, ...] = Field((), description="Addresses of running servers, such as http://127.0.0.1:30000.")
    adapters_only: bool = Field(
        False,
        description="`servers` are those of another policy, which sets their weights: this one takes LoRA adapters "
        "over what the model came with, and nothing else.",
    )
    launch: int = Field(1, ge=1, le=64, description="How many servers to launch where `servers` is empty.")
    python: str = Field("python", description="The interpreter of the environment that the engine is installed in.")
    flags: tuple[str, ...] = Field((), description="Passed through to the servers that are launched.")
    environment: dict[str, str] = Field({}, description="Variables of the launched servers, over the service's own.")
    start_seconds: float = Field(900.0, gt=0, description="How long a launched server may take until it is ready.")
    api_key: SecretStr | None = Field(None, description="The servers' --api-key.")
    api_key_file: KeyFile | None = Field(None, description="The file with it, instead.")
    folder: Path | None = Field(
        None,
        description="Where weights are put for the engines to load, shared with them, whose group may read them; the "
        "state folder if unset.",
    )
    folder_in_engine: str = Field("", description="What the servers call `folder`, where they see it elsewhere.")
    request_seconds: float = Field(600.0, gt=0, description="How long a server may take for one request.")
    wait_seconds: float = Field(10.0, ge=0, description="How long a request waits for a server when none serves.")
    probe_seconds: float = Field(1.0, gt=0, description="How often a server is asked whether it lives.")

    @field_validator("flags")
    @classmethod
    def _have_no_secret(cls, flags: tuple[str, ...]) -> tuple[str, ...]:
        check_flags(flags, cls.secret_flags)
        return flags

    @model_validator(mode="after")
    def _guests_have_servers(self) -> Self:
        if self.adapters_only and not self.servers:
            raise bad_setting("adapters_only", "it needs `servers`, those of the other policy")
        return self

    @property
    def is_guest(self) -> bool:
        return self.adapters_only

    @property
    def key(self) -> SecretStr | None:
        """What each request carries."""
        return self.api_key or read_key(self.api_key_file)

    @property
    def admin_key(self) -> SecretStr | None:
        """The key for calls that change a server, if the engine has one for them."""
        return None

    @property
    def setup(self) -> tuple[str, ...]:
        return self.flags
