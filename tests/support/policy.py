"""A policy service in the test's own process, over real gRPC, and what its answers are compared with."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from pydantic import SecretStr
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mulligan.common.channel import Endpoint
from mulligan.common.inference import PublishedWeights, WeightsKind
from mulligan.common.server import RequestInterceptor
from mulligan.policy.client import PolicyClient
from mulligan.policy.config import PolicySettings
from mulligan.policy.deployment import Deployment
from mulligan.policy.factory import OpenBackend, create_backend
from mulligan.policy.policies import Policies
from mulligan.policy.servicer import add_to_server, credentials


@dataclass
class Serving:
    address: str
    policies: Policies
    client: PolicyClient

    @property
    def deployment(self) -> Deployment:
        """The newest model of the default policy."""
        return self.policies.get().models.newest.deployment

    @property
    def backend(self) -> Any:
        return self.deployment.backend


@asynccontextmanager
async def serving(
    model: Path | str = "embedded", *, create: OpenBackend = create_backend, **settings: Any
) -> AsyncIterator[Serving]:
    chosen = PolicySettings(**({"model": str(model), "threads": 1} | settings))
    policies = await Policies.open(chosen, create)
    server = grpc.aio.server(interceptors=[RequestInterceptor({"": chosen.token, **credentials(chosen)})])
    add_to_server(server, policies)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    client = PolicyClient(
        Endpoint(address, token=_secret(chosen.token), outage_seconds=0),
        admin_token=_secret(chosen.admin_token),
        timeout=30,
    )
    try:
        yield Serving(address, policies, client)
    finally:
        await client.close()
        await server.stop(None)
        await policies.close()


def _secret(token: SecretStr | None) -> str | None:
    return token.get_secret_value() if token is not None else None


@torch.inference_mode()
def plain_log_probs(model: Any, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Of each token after the first, by transformers' own code, one sequence at a time."""
    ids = torch.tensor([list(token_ids)])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    picked: list[float] = torch.log_softmax(logits / temperature, -1).gather(1, ids[0, 1:, None])[:, 0].tolist()
    return picked


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def full_weights(
    path: Path, tensors: Mapping[str, torch.Tensor], version: int, fingerprint: str, **changes: Any
) -> PublishedWeights:
    """Writes the file and describes it."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    plain = {
        "policy_version": version,
        "kind": WeightsKind.FULL,
        "uri": path.resolve().as_uri(),
        "sha256": sha256(path),
        "fingerprint": fingerprint,
    }
    return PublishedWeights(**(plain | changes))
