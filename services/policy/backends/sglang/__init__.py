"""SGLang servers.  https://github.com/sgl-project/sglang"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, SecretStr, field_validator

from mulligan.common.extras import MissingExtra
from mulligan.policy.backend import Backend, HttpSettings
from mulligan.policy.backends._servers import ServerSettings
from mulligan.policy.key_file import KeyFile, read_key
from mulligan.policy.model_settings import ModelSettings

_KEYS = frozenset({"api_key", "api_key_file", "admin_api_key", "admin_api_key_file"})


class Settings(ServerSettings):
    """SGLang servers: those that run at `servers`, or else ones that this service launches and supervises.

    Those that it launches take requests with its key alone. Without `api_key` it makes one, anew at each start.
    """

    local_only: ClassVar = ServerSettings.local_only | {"admin_api_key_file"}
    in_0_1_0: ClassVar[bool] = True
    after_0_1_0: ClassVar = HttpSettings.local_only | {"adapters_only", "api_key_file", "admin_api_key_file"}
    credentials: ClassVar = {"servers": _KEYS, "router": _KEYS}
    secret_flags: ClassVar = {
        **ServerSettings.secret_flags,
        "--api-key": "set sglang.api_key_file",
        "--admin-api-key": "set sglang.admin_api_key_file",
    }

    router: str = Field("", description="Address of SGLang's router over `servers`; requests go through it.")
    admin_api_key: SecretStr | None = Field(None, description="The servers' --admin-api-key.")

    admin_api_key_file: KeyFile | None = Field(None, description="The file with it, instead.")

    @field_validator("flags")
    @classmethod
    def _name_no_file(cls, flags: tuple[str, ...]) -> tuple[str, ...]:
        if any(flag.partition("=")[0] == "--config" for flag in flags):  # SGLang takes one
            raise ValueError("--config names the file with the key: give what yours says as flags")
        return flags

    @property
    def admin_key(self) -> SecretStr | None:
        return self.admin_api_key or read_key(self.admin_api_key_file)

    @property
    def setup(self) -> tuple[str, ...]:
        """With what 0.1.0 put first, so that a checksum that it kept is still compared."""
        return ("auto", *self.flags)


async def open(settings: ModelSettings, folder: Path, first_version: int) -> Backend:
    """Weights are put into `folder` for the servers to load, unless the settings name another. Raises UnsupportedModel,
    MissingExtra."""
    try:
        from mulligan.policy.backends.sglang.backend import open_backend
    except ModuleNotFoundError as error:
        raise MissingExtra("sglang" if error.name in ("aiohttp", "msgspec") else "policy", error) from error
    return await open_backend(settings, folder, first_version)
