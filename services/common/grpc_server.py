"""gRPC's asyncio server, with its options for callers that nobody knows."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from grpc import StatusCode
from grpc._cython import cygrpc
from grpc.aio import _server as aio

from mulligan.common.config import ServiceSettings
from mulligan.common.connections import allowed
from mulligan.common.metrics import MethodMetrics

_PENDING_CALLS = 16_384
_WINDOW = 65_535  # bytes of a message that are received before its call is admitted


def options(settings: ServiceSettings) -> list[tuple[str, int]]:
    """https://grpc.github.io/grpc/core/group__grpc__arg__keys.html"""
    return [
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.so_reuseport", 0),  # a port that is taken raises an error; two servers never share one
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # for the keep-alive pings of clients
        # Pings of the server, for machines that vanished: their streams end.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.max_allowed_incoming_connections", allowed(settings.max_connections)),
        # Without a call, for once or twice as long. Clients connect again with their next call, and nobody notices.
        ("grpc.max_connection_idle_ms", int(settings.max_idle_seconds * 1000)),
        ("grpc.server_handshake_timeout_ms", 20_000),  # of TLS and HTTP/2
        ("grpc.max_concurrent_streams", settings.max_streams),
        # Calls that wait for the event loop. By default gRPC cancels random ones above 1,000.
        ("grpc.server.max_pending_requests", _PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _PENDING_CALLS),
        # Of a stream that nobody reads, gRPC keeps the window. Probing would enlarge it to 4 MiB. When a message is
        # read, its rest may come at once, whatever the window.
        ("grpc.http2.lookahead_bytes", _WINDOW),
        ("grpc.http2.bdp_probe", 0),
    ]


class _Core(cygrpc.AioServer):  # type: ignore[misc]  # it has no types
    """Answers calls that the server does not have by itself.

    gRPC decodes the names of such calls where an error ends the server: one call whose name is not UTF-8 did. The names
    of all others are known. (grpcio 1.85: `AioServer._server_main_loop`)
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, metrics: MethodMetrics | None, *arguments: Any):
        super().__init__(loop, *arguments)
        self._event_loop = loop
        self._metrics = metrics
        self._refusals: set[asyncio.Task[None]] = set()

    async def _request_call(self) -> Any:
        """Returns nothing: the next call of an unknown method is refused, and so on until the server ends."""
        while True:
            state = await super()._request_call()
            refusing = cygrpc._schedule_rpc_coro(self._refuse(state), state, self._event_loop, "unknown")
            task = self._event_loop.create_task(refusing)
            self._refusals.add(task)
            task.add_done_callback(self._refusals.discard)

    async def _refuse(self, state: Any) -> None:
        if self._metrics is not None:
            self._metrics.started()
            self._metrics.ended(StatusCode.UNIMPLEMENTED.name, 0.0)
        context = cygrpc._ServicerContext(state, None, None, self._event_loop)
        await context.abort(StatusCode.UNIMPLEMENTED, "Method not found!")


class Server(aio.Server):
    """Like `grpc.aio.server`. It serves registered methods, as generated code registers them. `unknown` counts calls of
    all others."""

    def __init__(
        self,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
        options: Sequence[tuple[str, Any]],
        unknown: MethodMetrics | None = None,
    ):
        self._loop = cygrpc.get_working_loop()
        self._server = _Core(self._loop, unknown, None, (), tuple(interceptors), tuple(options), None)

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Does nothing: generated code registers the same handlers by name, too."""

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        super().add_registered_method_handlers(service_name, dict(method_handlers))
