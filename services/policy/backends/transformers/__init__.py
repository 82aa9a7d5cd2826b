"""Any causal language model that transformers can load, on a CPU or one GPU, with an engine of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mulligan.common.extras import MissingExtra
from mulligan.policy.backend import Backend, BackendSettings
from mulligan.policy.model_settings import ModelSettings


class Settings(BackendSettings):
    """Settings of the engine in this process."""

    device: str = Field("auto", description="`auto`, `cpu`, `cuda`, `cuda:1`, …")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of weights and cache; auto: float32 on a CPU, what the model was saved in elsewhere."
    )
    threads: int = Field(
        0, ge=0, le=1024, description="Threads per forward pass on a CPU; 0: half of the cores, the rest serve calls."
    )
    deterministic: bool = Field(
        False, description="Every request runs alone, on one thread, and a repeated one gives exactly the same answer."
    )
    max_batch: int = Field(128, ge=1, le=4096, description="Requests that run together.")
    slots: int = Field(256, ge=1, le=65536, description="Conversations whose keys and values are kept, at most.")
    cache_gib: float = Field(
        4.0,
        gt=0,
        description="Memory for keys and values. On a CPU, conversations share it by their tokens; elsewhere each slot "
        "has memory for the whole context.",
    )
    tokens_per_pass: int = Field(4096, ge=16, description="New tokens per forward pass; longer prompts take several.")
    batch_wait_ms: float = Field(
        0.0, ge=0, le=1000, description="How long an idle engine waits, after a request, for others to join it."
    )

    @property
    def setup(self) -> tuple[str, ...]:
        return (self.device,)


async def open(settings: ModelSettings, folder: Path, first_version: int) -> Backend:
    """Does not use `folder`. Raises UnsupportedModel, MissingExtra."""
    try:
        from mulligan.policy.backends.transformers.backend import open_backend
    except ModuleNotFoundError as error:
        raise MissingExtra("policy", error) from error

    return await open_backend(settings, first_version)
