"""Which connections end, so that there is room for further ones."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass

import pytest

from mulligan.common import connections
from mulligan.common.connections import Connections, allowed

MOST = 400


@dataclass
class Server:
    """Accepts connections and keeps them."""

    listening: socket.socket
    stack: ExitStack

    @property
    def port(self) -> int:
        return int(self.listening.getsockname()[1])

    def connect(self, number: int, source: str = "") -> list[socket.socket]:
        made: list[socket.socket] = []
        while len(made) < number:
            address = self.listening.getsockname()[:2]
            one = socket.create_connection(address, source_address=(source, 0) if source else None)
            accepted = self.listening.accept()[0]
            if one.getsockname()[1] == self.port:  # of another address, so both can be had; it would count, too
                one.close()
                accepted.close()
                continue
            made.append(self.stack.enter_context(one))
            self.stack.enter_context(accepted)
        return made


@pytest.fixture(params=["127.0.0.1", "::1"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with ExitStack() as stack, socket.socket(family) as listening:
        listening.bind((request.param, 0))
        listening.listen(MOST)
        yield Server(listening, stack)


def ended(made: list[socket.socket]) -> list[socket.socket]:
    """Those that the other side has ended."""
    found = []
    for one in made:
        one.setblocking(False)
        with suppress(BlockingIOError):
            found += [one] if one.recv(1) == b"" else []
    return found


def peer(one: socket.socket) -> str:
    host, port = one.getsockname()[:2]
    return f"ipv4:{host}:{port}" if "." in host else f"ipv6:%5B{host}%5D:{port}"


def test_unused_ones_end_when_there_is_little_room_the_oldest_first(server: Server) -> None:
    old = server.connect(int(MOST * 0.7))
    with closing(Connections(server.port, MOST, lambda _: False)) as found:
        found.sweep()
        assert ended(old) == [], "there is room"
        new = server.connect(int(MOST * 0.1))
        assert found.sweep() == len(old) + len(new) - MOST // 2
        assert len(ended(old)) == len(old) + len(new) - MOST // 2 and ended(new) == []


def test_used_ones_stay(server: Server) -> None:
    made = server.connect(int(MOST * 0.8))
    used = {peer(one) for one in made[:250]}
    with closing(Connections(server.port, MOST, used.__contains__)) as found:
        assert found.sweep() == len(made) - 250
    assert ended(made) == made[250:]


def test_the_address_that_has_most_loses_most() -> None:
    with ExitStack() as stack, socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(MOST)
        server = Server(listening, stack)
        few, many = server.connect(30, "127.0.0.2"), server.connect(290, "127.0.0.3")
        with closing(Connections(server.port, MOST, lambda _: False)) as found:
            assert found.sweep() == 120
        assert ended(few) == [] and len(ended(many)) == 120


def test_other_files_and_connections_are_none_of_it(server: Server) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(MOST)
        elsewhere = Server(other, server.stack).connect(MOST)
        for _ in range(MOST):
            server.stack.enter_context(open(os.devnull))  # noqa: SIM115 - closed by the stack
        here = server.connect(10)
        with closing(Connections(server.port, MOST, lambda _: False)) as found:
            assert found.sweep() == 0
        assert ended(elsewhere + here) == []


def test_no_descriptor_has_to_be_free(server: Server) -> None:
    made = server.connect(int(MOST * 0.8))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(Connections(server.port, MOST, lambda _: False)) as found:
        files = len(os.listdir("/proc/self/fd"))
        listed = os.open("/proc/self/fd", os.O_RDONLY)  # a list of files needs one itself
        resource.setrlimit(resource.RLIMIT_NOFILE, (files + 1, hard))
        try:
            os.close(listed)
            assert found.sweep() > 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ended(made)


@pytest.mark.parametrize(
    ("limits", "most"), [((256, 256), 192), ((256, 4_096), 3_072), ((100_000, 100_000), 4_096), ((-1, -1), 4_096)]
)
def test_no_more_than_the_process_may_have_files(
    limits: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, chosen: given.append(chosen))
    assert allowed(4_096) == most
    assert given == ([(4_096, 4_096)] if limits == (256, 4_096) else [])


def test_a_sweep_that_fails_is_followed_by_others(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    made = server.connect(int(MOST * 0.8))
    monkeypatch.setattr(connections, "_SECONDS", 0.01)
    real = os.listdir
    failed: list[object] = []

    def listed(path: object) -> list[str]:
        if not failed:
            failed.append(path)
            raise OSError("planted")
        return real("/proc/self/fd")

    monkeypatch.setattr(os, "listdir", listed)
    with connections.kept_free(server.port, MOST, lambda _: False):
        made[0].settimeout(30)
        assert made[0].recv(1) == b""
    assert failed
