"""Any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, JsonValue, SecretStr

from mulligan.common.extras import MissingExtra
from mulligan.policy.backend import Backend, HttpSettings
from mulligan.policy.key_file import KeyFile, read_key
from mulligan.policy.model_settings import ModelSettings


class Settings(HttpSettings):
    """An endpoint that speaks OpenAI's chat completions."""

    in_0_1_0: ClassVar[bool] = True
    local_only: ClassVar = HttpSettings.local_only | {"api_key_file"}
    after_0_1_0: ClassVar = HttpSettings.local_only | {"api_key_file"}
    reads_files: ClassVar[bool] = False
    credentials: ClassVar = {"base_url": frozenset({"api_key", "api_key_file"})}

    base_url: str = Field("", description="Such as http://127.0.0.1:8000/v1.")
    api_key: SecretStr | None = Field(None, description="Sent as bearer token.")
    api_key_file: KeyFile | None = Field(None, description="The file with it, instead.")
    request_seconds: float = Field(600.0, gt=0, description="How long the endpoint may take for one request.")
    max_retries: int = Field(3, ge=0, le=20, description="Of requests that it refuses for the moment.")
    context_length: int = Field(0, ge=0, description="The model's, to be told to callers; 0: as the endpoint says.")
    concurrency: int = Field(256, ge=1, le=65536, description="Requests at the endpoint together; others wait here.")
    without: tuple[Literal["stream", "seed", "tools", "json_schema"], ...] = Field(
        (), description="What the endpoint ignores or lacks; options that need it are refused."
    )
    extra_body: dict[str, JsonValue] = Field(
        {}, description='Put over the body of every request: {"top_k": -1}, {"reasoning_effort": "low"}, …'
    )

    @property
    def key(self) -> SecretStr | None:
        """What each request carries."""
        return self.api_key or read_key(self.api_key_file)


async def open(settings: ModelSettings, folder: Path, first_version: int) -> Backend:
    """Does not use `folder`. Raises MissingExtra, and UnsupportedModel if the endpoint has no such model or refuses the
    credential."""
    try:
        from mulligan.policy.backends.openai.backend import open_backend
    except ModuleNotFoundError as error:
        raise MissingExtra("openai", error) from error
    return await open_backend(settings, first_version)
