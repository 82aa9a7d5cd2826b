"""Metrics over HTTP, for anybody who asks: a fixed number of connections and threads, whatever strangers do.

prometheus_client's own server has a thread for each connection, for as long as its caller likes.
"""

from __future__ import annotations

import io
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TextIO
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIEnvironment

import structlog
from prometheus_client import CollectorRegistry, make_wsgi_app

from mulligan.common.rate import TokenBucket

log = structlog.get_logger()
CONNECTIONS = 8
SECONDS = 5.0  # that a connection may last
_END_SECONDS = 0.25  # between two looks at how long they have lasted


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Writes nothing: strangers would fill the log."""

    def get_stderr(self) -> TextIO:
        return io.StringIO()


@dataclass(frozen=True, slots=True)
class _Open:
    host: str
    since: float


class MetricsServer(WSGIServer):
    """Answers each request with the registry's metrics until `close`. It has at most CONNECTIONS connections, each for
    at most SECONDS. A further one ends the oldest of the address that has most of them. Raises OSError for an address
    that is taken."""

    request_queue_size = 64

    def __init__(self, host: str, port: int, registry: CollectorRegistry):
        address = host.strip("[]")
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        self._show = make_wsgi_app(registry)
        self._failures = TokenBucket(0.1, 1)
        self._lock = threading.Lock()  # held where one of `_open` is ended: none of them is closed
        self._open: dict[socket.socket, _Open] = {}
        self._free = threading.Semaphore(CONNECTIONS)  # threads
        self._threads = ThreadPoolExecutor(CONNECTIONS, "metrics")
        super().__init__((str(found[0][4][0]), port), _Handler)
        self.set_app(self._answer)
        self._serving = threading.Thread(target=self.serve_forever, args=(_END_SECONDS,), name="metrics", daemon=True)
        self._serving.start()

    @property
    def connections(self) -> int:
        return len(self._open)

    def close(self) -> None:
        self.shutdown()
        self._serving.join()
        with self._lock:
            for request in [*self._open]:
                self._end(request)
        self._threads.shutdown()
        self.server_close()

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            shown: Iterable[bytes] = self._show(environ, start_response)
        except Exception:
            if self._failures.take():
                log.error("metrics cannot be shown", exc_info=True)
            start_response("500 Internal Server Error", [])
            return []
        return shown

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            with self._lock:
                if len(self._open) >= CONNECTIONS:  # else a thread is about to be free
                    self._end(self._oldest())
            if not self._free.acquire(timeout=SECONDS):
                self.shutdown_request(request)
                return
        with self._lock:
            self._open[request] = _Open(client_address[0], time.monotonic())
        self._threads.submit(self._handle, request, client_address)

    def _handle(self, request: socket.socket, client_address: Any) -> None:
        try:
            with suppress(Exception):  # its caller has gone, or was ended
                self.finish_request(request, client_address)
        finally:
            with self._lock:
                self._open.pop(request, None)
            self.shutdown_request(request)
            self._free.release()

    def service_actions(self) -> None:
        """Python's server calls it after each request, and periodically."""
        now = time.monotonic()
        with self._lock:
            for request, one in [*self._open.items()]:
                if now - one.since > SECONDS:
                    self._end(request)

    def _oldest(self) -> socket.socket:
        number = Counter(one.host for one in self._open.values())
        return max(self._open, key=lambda request: (number[self._open[request].host], -self._open[request].since))

    def _end(self, request: socket.socket) -> None:
        """Its thread notices that it can neither read nor write, and closes it."""
        del self._open[request]
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)
