"""Who writes, as the log of writes has it."""

from __future__ import annotations

from typing import Any

import pytest

from mulligan.memory.servicer import _actor


class Context:
    def __init__(self, peer: str, said: Any = None) -> None:
        self._peer = peer
        self._said = said

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> Any:
        return None if self._said is None else (("user-agent", "x"), ("mulligan-actor", self._said))


@pytest.mark.parametrize(
    ("context", "actor"),
    [
        (Context("ipv4:10.0.0.7:50123"), "10.0.0.7"),
        (Context("ipv6:%5B::1%5D:50123"), "::1"),
        (Context("ipv6:[fe80::1%25eth0]:50123"), "fe80::1%eth0"),
        (Context("unix:/run/memory.sock"), "unix"),
        (Context("ipv4:10.0.0.7:1", "ann"), "ann"),
        (Context("ipv4:10.0.0.7:1", "a\x1b[2J\r\nb\x7f\u202e"), "a[2Jb"),
        (Context("ipv4:10.0.0.7:1", "\x00" * 300 + "n" * 300), "n" * 200),
        (Context("ipv4:10.0.0.7:1", "\x00\n"), "10.0.0.7"),
        (Context("ipv4:10.0.0.7:1", ""), "10.0.0.7"),
    ],
)
def test_the_actor_is_said_or_the_peer(context: Context, actor: str) -> None:
    assert _actor(context) == actor
