"""SGLang servers.  https://github.com/sgl-project/sglang"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, SecretStr

from mulligan.common.extras import MissingExtra
from mulligan.policy.backend import Backend, BackendSettings
from mulligan.policy.model_settings import ModelSettings

_KEYS = frozenset({"api_key", "admin_api_key"})


class Settings(BackendSettings):
    """SGLang servers: those that run at `servers`, or else ones that this service launches and supervises."""

    local_only: ClassVar = frozenset({"python", "flags", "environment", "folder", "folder_in_engine"})
    credentials: ClassVar = {"servers": _KEYS, "router": _KEYS}
    exclusive: ClassVar = frozenset({"servers"})

    servers: tuple[str, ...] = Field((), description="Addresses of running servers, such as http://127.0.0.1:30000.")
    router: str = Field("", description="Address of SGLang's router over `servers`; requests go through it.")
    launch: int = Field(1, ge=1, le=64, description="How many servers to launch where `servers` is empty.")
    python: str = Field("python", description="The interpreter of the environment that SGLang is installed in.")
    flags: tuple[str, ...] = Field((), description="Passed through to sglang.launch_server.")
    environment: dict[str, str] = Field({}, description="Variables of the launched servers, over the service's own.")
    start_seconds: float = Field(900.0, gt=0, description="How long a launched server may take until it is ready.")
    api_key: SecretStr | None = Field(None, description="The servers' --api-key.")
    admin_api_key: SecretStr | None = Field(None, description="The servers' --admin-api-key.")
    folder: Path | None = Field(
        None, description="Where weights are put for the engines to load, shared with them; the state folder if unset."
    )
    folder_in_engine: str = Field("", description="What the servers call `folder`, where they see it elsewhere.")
    request_seconds: float = Field(600.0, gt=0, description="How long a server may take for one request.")
    wait_seconds: float = Field(10.0, ge=0, description="How long a request waits for a server when none serves.")
    probe_seconds: float = Field(1.0, gt=0, description="How often a server is asked whether it lives.")

    @property
    def setup(self) -> tuple[str, ...]:
        return self.flags


async def open(settings: ModelSettings, folder: Path, first_version: int) -> Backend:
    """Weights are put into `folder` for the servers to load, unless the settings name another. Raises UnsupportedModel,
    MissingExtra."""
    try:
        from mulligan.policy.backends.sglang.backend import open_backend
    except ModuleNotFoundError as error:
        raise MissingExtra("sglang" if error.name in ("aiohttp", "msgspec") else "policy", error) from error
    return await open_backend(settings, folder, first_version)
