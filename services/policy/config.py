"""Settings of the policy service."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, SecretStr

from services.common.config import ServiceSettings


class PolicySettings(ServiceSettings):
    service: ClassVar[str] = "policy"

    model: str = Field("embedded", description="Hub id, folder, or `embedded`: the small model that comes along.")
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
    context_length: int = Field(0, ge=0, description="Longest prompt plus completion in tokens; 0: the model's own.")
    max_batch: int = Field(128, ge=1, le=4096, description="Requests that run together.")
    max_queue: int = Field(4096, ge=0, description="Requests that wait; more are refused with QUEUE_FULL.")
    slots: int = Field(256, ge=1, le=65536, description="Conversations whose keys and values are kept, at most.")
    cache_gib: float = Field(4.0, gt=0, description="Memory for keys and values; the number of slots follows.")
    tokens_per_pass: int = Field(4096, ge=16, description="New tokens per forward pass; longer prompts take several.")
    batch_wait_ms: float = Field(
        0.0, ge=0, le=1000, description="How long an idle engine waits, after a request, for others to join it."
    )
    weights_folder: Path | None = Field(
        None, description="UpdateWeights loads from below this folder only; without it, not at all."
    )
    admin_token: SecretStr | None = Field(None, description="When set, UpdateWeights needs it as bearer token.")
