"""Which backend runs a model. Its module is imported when a policy asks for it: each has dependencies of its own."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

from services.common.model_files import UnsupportedModel
from services.policy.backend import Backend
from services.policy.config import ModelSettings

_BACKENDS = "services.policy.backends"

# Settings, a folder of the backend's own, and the policy version of the weights that the model came with.
OpenBackend = Callable[[ModelSettings, Path, int], Awaitable[Backend]]


async def create_backend(settings: ModelSettings, folder: Path, first_version: int) -> Backend:
    """`folder` is a directory that the backend may write to; `first_version` is the policy version of the weights that
    the model came with. Raises UnsupportedModel."""
    return await _find(settings.backend)(settings, folder, first_version)


def _find(name: str) -> OpenBackend:
    try:
        module = importlib.import_module(f"{_BACKENDS}.{name}")
    except ModuleNotFoundError as error:
        raise UnsupportedModel(f"backend {name}: {error.name} is not installed") from error
    return cast(OpenBackend, module.open_backend)
