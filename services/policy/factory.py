"""Which backend runs a model. Its module is imported when a policy asks for it: each has dependencies of its own."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import structlog

from mulligan.common.errors import DomainError
from mulligan.common.model_files import UnsupportedModel, short
from mulligan.policy.backend import Backend
from mulligan.policy.config import ModelSettings

log = structlog.get_logger()
_BACKENDS = "mulligan.policy.backends"

# Settings, a folder of the backend's own, and the policy version of the weights that the model came with.
OpenBackend = Callable[[ModelSettings, Path, int], Awaitable[Backend]]


async def create_backend(settings: ModelSettings, folder: Path, first_version: int) -> Backend:
    """`folder` is a directory that the backend may write to; `first_version` is the policy version of the weights that
    the model came with. Raises UnsupportedModel."""
    try:
        return await _find(settings.backend)(settings, folder, first_version)
    except (UnsupportedModel, DomainError, OSError):
        raise
    except Exception as error:  # a model's files make libraries fail in ways that nobody has listed
        log.exception("a model cannot be opened", model=settings.model, backend=settings.backend)
        raise UnsupportedModel(f"{settings.model} cannot be opened: {type(error).__name__}: {short(error)}") from error


def _find(name: str) -> OpenBackend:
    try:
        module = importlib.import_module(f"{_BACKENDS}.{name}")
    except ModuleNotFoundError as error:
        raise UnsupportedModel(f"backend {name}: {error.name} is not installed") from error
    return cast(OpenBackend, module.open_backend)
