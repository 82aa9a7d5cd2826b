"""A policy service in the test's own process, over real gRPC, and what its answers are compared with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from mulligan.common.access import AccessRole
from mulligan.common.channel import Endpoint
from mulligan.common.server import RequestInterceptor
from mulligan.policy.client import PolicyClient
from mulligan.policy.config import PolicySettings
from mulligan.policy.deployment import Deployment
from mulligan.policy.factory import OpenBackend, create_backend
from mulligan.policy.policies import Policies
from mulligan.policy.servicer import add_to_server
from tests.support.tokens import token_of


@dataclass
class Serving:
    address: str
    policies: Policies
    client: PolicyClient

    @property
    def deployment(self) -> Deployment:
        """The newest model of the default policy."""
        return self.policies.get().newest

    @property
    def backend(self) -> Any:
        return self.deployment.backend


@asynccontextmanager
async def serving(
    model: Path | str = "embedded", *, create: OpenBackend = create_backend, **settings: Any
) -> AsyncIterator[Serving]:
    chosen = PolicySettings.model_validate({"model": str(model), "threads": 1} | settings)
    policies = await Policies.open(chosen, create)
    server = grpc.aio.server(interceptors=[RequestInterceptor(chosen.tokens)])
    add_to_server(server, policies)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    token = token_of(AccessRole.ADMIN) if chosen.tokens is not None else None
    client = PolicyClient(Endpoint(address, token=token, outage_seconds=0), timeout=30)
    try:
        yield Serving(address, policies, client)
    finally:
        await client.close()
        await server.stop(None)
        await policies.close()
