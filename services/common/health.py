"""The standard health service.  https://github.com/grpc/grpc/blob/master/doc/health-checking.md

That of grpcio-health-checking holds a lock while it writes to a watcher: one that does not read its answers would keep
all others, and the service, from every later change.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SECONDS = 0.5  # between two looks at the health of a service's parts
_Status = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):
    """`observe` returns whether each service or part serves, by name. It is called for each check, and periodically for
    watchers."""

    def __init__(self, observe: Callable[[], Mapping[str, bool]]):
        self._observe = observe
        self._reported: dict[str, bool] = {}
        self._known: dict[str, bool] = {"": True}
        self._stopping = False
        self._changed = asyncio.Event()  # another one after each change

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - as in the contract
        self.refresh()
        if request.service not in self._known:
            await context.abort(grpc.StatusCode.NOT_FOUND, "")
        return _Status(status=self._status(request.service))

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        last = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status == last:
                await changed.wait()
            else:
                last = status
                yield _Status(status=status)

    def _status(self, service: str) -> Any:
        if service not in self._known:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._known[service] and not self._stopping else _Status.NOT_SERVING

    def serves(self, *services: str) -> None:
        """They are healthy until the server stops."""
        self._known |= dict.fromkeys(services, True)
        self._tell()

    def stop(self) -> None:
        """Nothing is healthy from now on."""
        self._stopping = True
        self._tell()

    def refresh(self) -> None:
        present = dict(self._observe())
        if present == self._reported:
            return
        for name in self._reported.keys() - present.keys():
            del self._known[name]
        self._known |= present
        self._reported = present
        self._tell()

    async def watch(self) -> None:
        while True:
            self.refresh()
            await asyncio.sleep(_SECONDS)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
