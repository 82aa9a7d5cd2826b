"""vLLM servers.  https://github.com/vllm-project/vllm"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from mulligan.common.extras import MissingExtra
from mulligan.policy.backend import Backend
from mulligan.policy.backends._servers import ServerSettings
from mulligan.policy.model_settings import ModelSettings


class Settings(ServerSettings):
    """vLLM servers: those that run at `servers`, or else ones that this service launches and supervises."""

    credentials: ClassVar = {"servers": frozenset({"api_key", "api_key_file"})}
    secret_flags: ClassVar = {
        **ServerSettings.secret_flags,
        "--api-key": "set the variable VLLM_API_KEY of this service, and vllm.api_key_file",
    }


async def open(settings: ModelSettings, folder: Path, first_version: int) -> Backend:
    """Weights are put into `folder` for the servers to load, unless the settings name another. Raises UnsupportedModel,
    MissingExtra."""
    try:
        from mulligan.policy.backends.vllm.backend import open_backend
    except ModuleNotFoundError as error:
        raise MissingExtra("vllm" if error.name in ("aiohttp", "msgspec") else "policy", error) from error
    return await open_backend(settings, folder, first_version)
