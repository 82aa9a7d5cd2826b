"""Opens the backend that runs a model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from mulligan.common.errors import DomainError, fault, incident
from mulligan.common.extras import MissingExtra
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy.backend import Backend
from mulligan.policy.backends import BACKENDS
from mulligan.policy.model_settings import ModelSettings

log = structlog.get_logger()

# What a backend exports as `open`. It takes settings, a folder that the backend may write to, and the policy version of
# the weights that the model came with.
OpenBackend = Callable[[ModelSettings, Path, int], Awaitable[Backend]]


async def create_backend(settings: ModelSettings, folder: Path, first_version: int) -> Backend:
    """Raises UnsupportedModel; OSError and DomainError as the backend does."""
    open_backend: OpenBackend = BACKENDS.find(settings.backend).open
    try:
        return await open_backend(settings, folder, first_version)
    except (UnsupportedModel, DomainError, OSError):
        raise
    except MissingExtra as error:
        raise UnsupportedModel(f"backend {settings.backend} {error}") from error
    except Exception as error:  # a model's files make libraries fail in ways that nobody has listed
        # It may quote anything that the process knows, so callers of LoadModel get the type and the incident alone.
        facts = {"model": settings.model, "backend": settings.backend, "incident": incident(error)}
        log.exception("a model cannot be opened", **facts)
        raise UnsupportedModel(f"{settings.model} cannot be opened: {fault(error)}") from error
