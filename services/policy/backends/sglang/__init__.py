"""SGLang servers.  https://github.com/sgl-project/sglang"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, SecretStr

from mulligan.common.extras import MissingExtra
from mulligan.policy.backend import Backend
from mulligan.policy.backends._servers import ServerSettings
from mulligan.policy.model_settings import ModelSettings

_KEYS = frozenset({"api_key", "admin_api_key"})


class Settings(ServerSettings):
    """SGLang servers: those that run at `servers`, or else ones that this service launches and supervises."""

    in_0_1_0: ClassVar[bool] = True
    credentials: ClassVar = {"servers": _KEYS, "router": _KEYS}

    router: str = Field("", description="Address of SGLang's router over `servers`; requests go through it.")
    admin_api_key: SecretStr | None = Field(None, description="The servers' --admin-api-key.")

    @property
    def admin_key(self) -> SecretStr | None:
        return self.admin_api_key

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
