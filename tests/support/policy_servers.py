"""Policy services on scripted engines, each at a port of its own that survives a restart, and a client of all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from safetensors.numpy import save_file

from mulligan.common.channel import Endpoint
from mulligan.common.inference import CanaryProbe, PublishedWeights, WeightsKind
from mulligan.common.server import RequestInterceptor
from mulligan.policy.backend import Scored
from mulligan.policy.config import PolicySettings
from mulligan.policy.policies import Policies
from mulligan.policy.replicas import PolicyReplicas, connect
from mulligan.policy.servicer import add_to_server
from mulligan.testing.weights import sha256
from tests.support.scripted import Opened, ScriptedBackend

PROBE = CanaryProbe((1, 2, 3), (-1.0, -1.0))  # what a scripted engine scores


class _Wrong(ScriptedBackend):
    """Holds other weights than it was given, from a version on."""

    wrong_from = 0

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float, adapter: str = "") -> Scored:
        value = -2.0 if self.policy_version >= self.wrong_from else -1.0
        return Scored(tuple((value,) * (len(row) - 1) for row in sequences), self.policy_version)


@dataclass
class PolicyServer:
    folder: Path
    settings: dict[str, Any]
    opened: Opened = field(default_factory=Opened)
    address: str = "127.0.0.1:0"
    policies: Policies | None = None
    _server: grpc.aio.Server | None = None

    @property
    def engine(self) -> ScriptedBackend:
        return self.opened.backends[-1]

    @property
    def calls(self) -> int:
        return len(self.engine.asks)

    def spoil(self, version: int) -> None:
        """Its engine fails the canary of this version and those after it."""
        self.engine.__class__ = _Wrong
        self.engine.wrong_from = version  # type: ignore[attr-defined]

    async def start(self, **changes: Any) -> None:
        chosen = PolicySettings.model_validate(
            {"model": "one", "weights_folder": self.folder} | self.settings | changes
        )
        self.policies = await Policies.open(chosen, self.opened.create)
        options = [("grpc.so_reuseport", 0)]
        interceptor = RequestInterceptor(chosen.tokens)
        self._server = grpc.aio.server(interceptors=[interceptor], options=options)
        add_to_server(self._server, self.policies)
        port = self._server.add_insecure_port(self.address)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None and self.policies is not None:
            await self._server.stop(None)
            await self.policies.close()
            self._server = None

    async def restart(self, **changes: Any) -> None:
        """Without anything that it knew, unless there is a `state_folder`."""
        await self.stop()
        await self.start(**changes)


@dataclass
class PolicyServers:
    servers: list[PolicyServer]
    client: PolicyReplicas
    notices: list[str]
    folder: Path

    def weights(self, version: int, **changes: Any) -> PublishedWeights:
        path = self.folder / f"{version}.safetensors"
        save_file({"w": np.full(3, version, np.float32)}, path)
        plain: dict[str, Any] = {"fingerprint": "one", "uri": path.as_uri(), "sha256": sha256(path), "canary": (PROBE,)}
        plain |= {"policy_version": version, "kind": WeightsKind.FULL}
        return PublishedWeights(**(plain | changes))

    @property
    def versions(self) -> list[int]:
        """Of the engines."""
        return [server.engine.policy_version for server in self.servers]


@asynccontextmanager
async def policy_servers(
    folder: Path, count: int = 2, *, outage_seconds: float = 20.0, **settings: Any
) -> AsyncIterator[PolicyServers]:
    servers = [PolicyServer(folder, settings) for _ in range(count)]
    notices: list[str] = []
    for server in servers:
        await server.start()
    address = ",".join(server.address for server in servers)
    client = connect(Endpoint(address, outage_seconds=outage_seconds), timeout=20, on_outage=notices.append)
    assert isinstance(client, PolicyReplicas)
    try:
        yield PolicyServers(servers, client, notices, folder)
    finally:
        await client.close()
        for server in servers:
            await server.stop()
