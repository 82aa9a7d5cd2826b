"""Settings of the trainer service."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from mulligan.common.access import AccessRole
from mulligan.common.addresses import Addresses, one_server
from mulligan.common.channel import Endpoint, check_protection
from mulligan.common.config import ClientTokenFile
from mulligan.common.guarded import GuardedSettings
from mulligan.common.run_credentials import OWN_SECONDS, RunGrant
from mulligan.trainer.admission import NamesInUse, RunAdmission
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerUse

ServerAddress = Annotated[str, AfterValidator(one_server)]
ServerAddresses = Annotated[str, AfterValidator(lambda text: Addresses.parse(text).text)]
OptionalAddress = Annotated[str, AfterValidator(lambda text: text and Addresses.parse(text).text)]


class TrainerSettings(GuardedSettings):
    service: ClassVar[str] = "trainer"

    runs_folder: Path = Field(Path("runs"), description="One folder per run: settings, journal, events, summary.")
    checkpoint_folder: Path = Field(Path("runs/checkpoints"), description="Checkpoints of the learner.")
    weights_folder: Path = Field(
        Path("runs/weights"), description="Published weights; the policy service reads them in the same place."
    )
    models_folder: Path | None = Field(
        None, description="Models to train come from below this folder, or are hub ids; without it, hub ids alone."
    )
    weights_transfer: Literal["shared", "upload"] = Field(
        "shared",
        description="shared: the policy service reads weights_folder; upload: files, or what changed, are sent to it.",
    )
    weights_access: Literal["owner", "group"] = Field(
        "owner",
        description="Who may read weights_folder: owner, this process's user; or group, the folder's group, too, where "
        "the policy service runs as another user.",
    )
    env_address: ServerAddresses = Field(
        "127.0.0.1:50051", description="The environment service: HOST:PORT, HOST:FIRST-LAST, dns:///NAME:PORT, …, …"
    )
    policy_address: ServerAddresses = Field(
        "127.0.0.1:50052", description="The policy service, likewise. New weights go to every server of it."
    )
    memory_address: ServerAddress = Field("127.0.0.1:50053", description="The memory service.")
    learner_address: OptionalAddress = Field(
        "", description="Another trainer's LearnerService; this process's own when empty."
    )
    env_token_file: ClientTokenFile | None = Field(
        None, description="Its first line is the token that the env service gets: of the role actor."
    )
    policy_token_file: ClientTokenFile | None = Field(
        None, description="Likewise for the policy service: of the role trainer."
    )
    memory_token_file: ClientTokenFile | None = Field(
        None, description="Likewise for the memory service: of the role trainer."
    )
    learner_token_file: ClientTokenFile | None = Field(
        None, description="Likewise for the trainer at `learner_address`: of the role trainer."
    )
    env_tls_ca: Path | None = Field(
        None, description="PEM file: the authorities that the certificate of the env service is of."
    )
    env_tls_name: str = Field("", description="The name in that certificate, where it is not the address's host.")
    env_tls_cert: Path | None = Field(None, description="PEM file: what identifies the trainer there.")
    env_tls_key: Path | None = None
    policy_tls_ca: Path | None = Field(
        None, description="PEM file: the authorities that the certificate of the policy service is of."
    )
    policy_tls_name: str = Field("", description="The name in that certificate, where it is not the address's host.")
    policy_tls_cert: Path | None = Field(None, description="PEM file: what identifies the trainer there.")
    policy_tls_key: Path | None = None
    memory_tls_ca: Path | None = Field(
        None, description="PEM file: the authorities that the certificate of the memory service is of."
    )
    memory_tls_name: str = Field("", description="The name in that certificate, where it is not the address's host.")
    memory_tls_cert: Path | None = Field(None, description="PEM file: what identifies the trainer there.")
    memory_tls_key: Path | None = None
    learner_tls_ca: Path | None = Field(
        None, description="PEM file: the authorities that the certificate of the trainer at `learner_address` is of."
    )
    learner_tls_name: str = Field("", description="The name in that certificate, where it is not the address's host.")
    learner_tls_cert: Path | None = Field(None, description="PEM file: what identifies the trainer there.")
    learner_tls_key: Path | None = None
    outage_seconds: float = Field(120.0, gt=0, description="How long a service may be away before a run fails.")
    lost_seconds: float = Field(
        10.0, ge=0, description="How long one of several env servers may be away before its episodes count as lost."
    )
    device: str = Field("cpu", description="Of the learner, as torch names it: cpu, cuda, cuda:1.")
    learner_processes: int = Field(
        1, ge=1, description="Processes among which the learner shares out data and weights, started by torchrun."
    )
    threads: int = Field(
        0, ge=0, description="Of torch on the CPU, per process; 0: half of the cores in all, as the policy's."
    )
    microbatch_tokens: int = Field(
        0,
        ge=0,
        description="Tokens that a process of the learner computes at once; 0: 768 on a CPU, 4096 on a GPU.",
    )
    gradient_checkpointing: bool = Field(
        False, description="The learner's backward pass computes activations again: less memory, more time."
    )
    attention: Literal["auto", "sdpa"] = Field(
        "auto", description="The learner's, of shared prefixes; auto: FlexAttention on a GPU where it works, else sdpa."
    )
    keep_weights: int = Field(3, ge=1, description="Published versions to keep.")
    learner_lease_seconds: float = Field(
        3600.0,
        ge=0,
        le=2_592_000,
        description="A learner whose caller asked for no lease is deleted after so long without a call; 0: never. Runs "
        "renew theirs.",
    )

    credential_hours: float = Field(
        24.0, gt=0, description="How long the credential counts that StartRun answers, where `run_keys` signs one."
    )

    @model_validator(mode="after")
    def _each_process_has_a_gpu(self) -> Self:
        if max(self.learner_processes, processes_of_torchrun()) > 1 and ":" in self.device:
            raise ValueError("device: expected cuda without a number: each process of the learner has a GPU of its own")
        return self

    @model_validator(mode="after")
    def _calls_to_others_are_protected(self) -> Self:
        for service in ("env", "policy", "memory", "learner"):
            endpoint = self.endpoint(service)  # raises ValueError for incomplete or bad TLS
            if endpoint.address:
                check_protection(endpoint)
        return self

    @property
    def learner(self) -> LearnerServerSettings:
        return LearnerServerSettings(
            weights_folder=self.weights_folder,
            checkpoint_folder=self.checkpoint_folder,
            device=self.device,
            threads=self.threads or max(1, (os.cpu_count() or 1) // 2 // processes_of_torchrun()),
            microbatch_tokens=self.microbatch_tokens or (768 if self.device.startswith("cpu") else 4096),
            gradient_checkpointing=self.gradient_checkpointing,
            attention=self.attention,
            weights_access=self.weights_access,
            keep_weights=self.keep_weights,
            lease_seconds=self.learner_lease_seconds or None,
            models_folder=self.models_folder,
        )

    def admission(
        self,
        snapshot: Callable[[str], Awaitable[int]],
        learner_use: Callable[[str], Awaitable[LearnerUse]],
    ) -> RunAdmission:
        """With another trainer's learner, models are that trainer's."""
        return RunAdmission(
            self.guard,
            self.keys,
            self.credential_hours * 3600,
            checks_models=not self.learner_address,
            models_folder=self.models_folder,
            in_use=NamesInUse(snapshot, learner_use),
            insecure=self.insecure,
        )

    def run_credential(self, run_id: str, *scopes: str) -> Callable[[], str] | None:
        """Signs what a call for a run needs; None without a private key."""
        keys = self.keys
        if keys is None or not keys.can_sign:
            return None
        return lambda: keys.sign(RunGrant(run_id, scopes), OWN_SECONDS)

    def endpoint(self, service: Literal["env", "policy", "memory", "learner"]) -> Endpoint:
        """Another service's."""
        return Endpoint(
            getattr(self, f"{service}_address"),
            token_file=getattr(self, f"{service}_token_file"),
            tls=self.client_tls(service),
            insecure=self.insecure,
            outage_seconds=self.outage_seconds,
            max_message_bytes=self.max_message_bytes,
        )

    def own_endpoint(self, address: str) -> Endpoint:
        """This process's, at an address without TLS."""
        return Endpoint(
            address,
            token=self.tokens.issue(AccessRole.TRAINER) if self.tokens is not None else None,
            outage_seconds=self.outage_seconds,
            max_message_bytes=self.max_message_bytes,
        )


def processes_of_torchrun() -> int:
    """Those on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
