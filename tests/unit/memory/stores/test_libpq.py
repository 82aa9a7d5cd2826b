"""A password of PostgreSQL goes to another machine over TLS alone, to a server that shows that it is the one."""

from __future__ import annotations

import socket
import struct
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from mulligan.memory.store import StoreError
from mulligan.memory.stores import postgres
from mulligan.memory.stores._sql import libpq

_VARIABLES = ("HOST", "HOSTADDR", "PASSWORD", "PASSFILE", "SERVICE", "SSLMODE")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in _VARIABLES:
        monkeypatch.delenv(f"PG{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no .pgpass


def mode(location: str) -> object:
    return libpq.protected(sa.make_url(location)).query.get("sslmode", "")


FAR = "postgresql://u:pw@db.example.org/d"


@pytest.mark.parametrize(
    ("location", "found"),
    [
        (FAR, "verify-full"),
        (f"{FAR}?sslmode=verify-ca", "verify-ca"),
        ("postgresql://u@192.0.2.2/d?password=pw", "verify-full"),
        ("postgresql://u:pw@127.0.0.1/d?hostaddr=192.0.2.2", "verify-full"),
        ("postgresql://u:pw@/d?host=127.0.0.1:5432&host=db:5432", "verify-full"),
        ("postgresql://u:pw@127.0.0.1,db/d", "verify-full"),
        ("postgresql://u@127.0.0.1/d?service=far", "verify-full"),
        ("postgresql://u@db.example.org/d", ""),  # without a password
        ("postgresql://u:pw@127.0.0.1:5432/d", ""),
        ("postgresql://u:pw@localhost/d?sslmode=disable", "disable"),
        ("postgresql://u:pw@[::1]/d", ""),
        ("postgresql://u:pw@/d?host=/run/postgresql", ""),
        ("postgresql://u:pw@/d?host=127.0.0.1:5432&host=[::1]:5433", ""),
        ("postgresql://u:pw@/d", ""),
    ],
)
def test_tls_is_wanted_where_a_password_leaves_the_machine(location: str, found: str) -> None:
    assert mode(location) == found


def test_variables_and_files_count_as_the_url_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = "postgresql://u@db.example.org/d"
    monkeypatch.setenv("PGPASSWORD", "pw")
    assert mode(plain) == "verify-full" and mode("postgresql://u@/d") == ""
    monkeypatch.setenv("PGHOST", "db.example.org")
    assert mode("postgresql://u@/d") == "verify-full"
    monkeypatch.delenv("PGPASSWORD")
    assert mode("postgresql://u@/d") == ""
    (tmp_path / ".pgpass").touch()
    assert mode(plain) == "verify-full"
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))
    assert mode(plain) == ""
    monkeypatch.setenv("PGSERVICE", "far")
    assert mode("postgresql://u@/d") == "verify-full"
    monkeypatch.setenv("PGSSLMODE", "verify-ca")
    assert mode(FAR) == "", "the variable's mode is enough"


@pytest.mark.parametrize("chosen", ["disable", "allow", "prefer", "require"])
def test_a_mode_that_lets_anybody_answer_is_refused(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=f"expected sslmode=verify-full \\(or verify-ca\\), not {chosen}") as caught:
        mode(f"{FAR}?sslmode={chosen}")
    assert "pw" not in str(caught.value).replace("password", "")
    url = sa.make_url(f"{FAR}?sslmode={chosen}")
    assert libpq.protected(url, insecure=True) == url
    monkeypatch.setenv("PGSSLMODE", chosen)
    with pytest.raises(StoreError, match=f"not {chosen}"):
        mode(FAR)


class Impostor:
    """Says no to TLS, and asks for a password in the clear. `got` is what it received after that."""

    def __init__(self) -> None:
        self.got = b""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                while length := connection.recv(4):
                    body = connection.recv(struct.unpack("!I", length)[0] - 4)
                    if struct.unpack("!I", body[:4])[0] in (80877103, 80877104):  # SSL, GSS
                        connection.sendall(b"N")
                        continue
                    connection.sendall(b"R" + struct.pack("!II", 8, 3))
                    self.got += connection.recv(200)
                    break

    def close(self) -> None:
        self._listening.close()


@pytest.mark.parametrize("insecure", [False, True])
async def test_a_server_without_tls_gets_no_password(insecure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libpq, "is_loopback", lambda host: False)  # as if it were another machine
    monkeypatch.setenv("PGPASSWORD", "SECRETPW")
    server = Impostor()
    try:
        location = f"postgresql://u@127.0.0.1:{server.port}/d"
        with pytest.raises(StoreError) as caught:
            await postgres.open(location, postgres.Settings(insecure=insecure))
    finally:
        server.close()
    assert (b"SECRETPW" in server.got) == insecure
    assert insecure or "server does not support SSL, but SSL was required" in str(caught.value)
