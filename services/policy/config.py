"""Settings of the policy service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, SecretStr, StringConstraints, model_validator

from mulligan.common.config import ServiceSettings

PolicyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class SglangSettings(BaseModel):
    """SGLang servers: those that run at `servers`, or else ones that this service launches and supervises."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    servers: tuple[str, ...] = Field((), description="Addresses of running servers, such as http://127.0.0.1:30000.")
    router: str = Field("", description="Address of SGLang's router over `servers`; requests go through it.")
    launch: int = Field(1, ge=1, le=64, description="How many servers to launch where `servers` is empty.")
    python: str = Field("python", description="The interpreter of the environment that SGLang is installed in.")
    flags: tuple[str, ...] = Field((), description="Passed through to sglang.launch_server.")
    environment: dict[str, str] = Field({}, description="Variables of the launched servers, over the service's own.")
    start_seconds: float = Field(900.0, gt=0, description="How long a launched server may take until it is ready.")
    api_key: SecretStr | None = Field(None, description="The servers' --api-key.")
    admin_api_key: SecretStr | None = Field(None, description="The servers' --admin-api-key.")
    folder: Path | None = Field(
        None, description="Where weights are put for the engines to load, shared with them; the state folder if unset."
    )
    folder_in_engine: str = Field("", description="What the servers call `folder`, where they see it elsewhere.")
    request_seconds: float = Field(600.0, gt=0, description="How long a server may take for one request.")
    wait_seconds: float = Field(10.0, ge=0, description="How long a request waits for a server when none serves.")
    probe_seconds: float = Field(1.0, gt=0, description="How often a server is asked whether it lives.")


class OpenAISettings(BaseModel):
    """An endpoint that speaks OpenAI's chat completions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str = Field("", description="Such as http://127.0.0.1:8000/v1.")
    api_key: SecretStr | None = Field(None, description="Sent as bearer token.")
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


class ModelSettings(BaseModel):
    """One policy: a model and what runs it."""

    backend: Literal["transformers", "sglang", "openai"] = Field("transformers", description="What runs the model.")
    model: str = Field("embedded", description="Hub id, folder, or `embedded`: the small model that comes along.")
    frozen: bool = Field(False, description="Its weights are never updated: a reference, an opponent.")
    adapters: dict[str, str] = Field(
        {}, description="Fixed LoRA adapters that requests may name: folders, or an endpoint's model names."
    )
    context_length: int = Field(0, ge=0, description="Longest prompt plus completion in tokens; 0: the model's own.")
    max_queue: int = Field(4096, ge=0, description="Requests that wait; more are refused with QUEUE_FULL.")
    sglang: SglangSettings = SglangSettings()
    openai: OpenAISettings = OpenAISettings()
    # The rest is of the transformers backend.
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
    cache_gib: float = Field(4.0, gt=0, description="Memory for keys and values; the number of slots follows.")
    tokens_per_pass: int = Field(4096, ge=16, description="New tokens per forward pass; longer prompts take several.")
    batch_wait_ms: float = Field(
        0.0, ge=0, le=1000, description="How long an idle engine waits, after a request, for others to join it."
    )

    @property
    def model_name(self) -> str:
        """Hub id or name of a folder, without where the folder is."""
        return Path(self.model).name if Path(self.model).is_dir() else self.model


class PolicyModelSettings(ModelSettings):
    """A further policy, as it stands in the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicySettings(ModelSettings, ServiceSettings):
    """Its own fields describe the default policy; `policies` adds others by name."""

    service: ClassVar[str] = "policy"

    default_policy: PolicyName = Field("actor", description="Name of the policy described here.")
    policies: dict[PolicyName, PolicyModelSettings] = Field({}, description="Further policies: [policies.reference] …")
    weights_folder: Path | None = Field(
        None, description="UpdateWeights loads from below this folder only; without it, from uploads alone."
    )
    models_folder: Path | None = Field(
        None, description="LoadModel loads folders from below this one only; without it, hub ids alone."
    )
    state_folder: Path | None = Field(
        None, description="Where versions, uploads and loaded models survive a restart; without it nothing does."
    )
    keep_versions: int = Field(3, ge=1, le=1000, description="Versions of each policy that Rollback can serve again.")
    canary_tolerance: float = Field(
        0.0,
        ge=0,
        description="Largest difference to the trainer's log-probabilities; 0: 0.001 in float32, 0.25 in less.",
    )
    session_idle_seconds: float = Field(
        60.0, gt=0, description="A replaced model is closed when none of its sessions has asked for so long."
    )
    upload_gib: float = Field(1024.0, gt=0, description="Uploaded weights that wait for their UpdateWeights, at most.")
    admin_token: SecretStr | None = Field(None, description="When set, PolicyAdminService needs it as bearer token.")
    admin_token_file: Path | None = Field(None, description="File that holds `admin_token`.")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        if self.default_policy in self.policies:
            raise ValueError(f"policies.{self.default_policy}: the default policy is described outside of `policies`")
        return self
