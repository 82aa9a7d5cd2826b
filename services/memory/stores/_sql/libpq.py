"""How libpq protects the password of a PostgreSQL server on its way. By itself it sends one without TLS, or over TLS to
whoever answers. https://www.postgresql.org/docs/current/libpq-ssl.html"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from mulligan.common.addresses import is_loopback
from mulligan.memory.store import StoreError

_CHECKED = ("verify-full", "verify-ca")  # modes in which the server's certificate is checked


def protected(url: sa.URL, *, insecure: bool = False) -> sa.URL:
    """The URL with `sslmode=verify-full` where a password may go to another machine and no mode was chosen. Raises
    StoreError if one was that does not check the server, unless `insecure`."""
    if insecure or not _may_send_password(url) or _is_local(url):
        return url
    chosen = [*_of_query(url, "sslmode")] or [os.environ.get("PGSSLMODE", "")]
    if all(mode in _CHECKED for mode in chosen):
        return url
    if chosen == [""]:
        return url.update_query_dict({"sslmode": _CHECKED[0]})
    raise StoreError(
        "database: the password would cross the network without TLS that checks the server: expected "
        f"sslmode={_CHECKED[0]} (or {_CHECKED[1]}), not {', '.join(chosen)}, or postgres.insecure"
    )


def _may_send_password(url: sa.URL) -> bool:
    """Whether libpq may find a password: in the URL, a variable, its file of passwords, or the file of a service."""
    given = bool(url.password) or any(_of_query(url, "password"))
    if given or os.environ.get("PGPASSWORD") or _service(url):
        return True
    files = [*_of_query(url, "passfile"), os.environ.get("PGPASSFILE", "")]
    try:
        files = [*filter(None, files)] or [str(Path.home() / ".pgpass")]
    except RuntimeError:  # a user without a home folder
        return False
    return any(map(os.path.exists, files))


def _is_local(url: sa.URL) -> bool:
    """Whether all servers that libpq may try are on this machine."""
    if _service(url):
        return False  # its file may name any host
    hosts = [*_of_query(url, "host")] or [url.host or os.environ.get("PGHOST", "")]
    addresses = [*_of_query(url, "hostaddr")] or [os.environ.get("PGHOSTADDR", "")]
    names = [name for one in (*hosts, *addresses) for name in one.split(",")]
    return all(name.startswith(("/", "@")) or is_loopback(_host(name)) for name in names)


def _host(name: str) -> str:
    """Without the port that SQLAlchemy takes in `?host=HOST:PORT`."""
    host, colon, port = name.rpartition(":")
    return host if colon and port.isdecimal() and (":" not in host or host.startswith("[")) else name


def _service(url: sa.URL) -> bool:
    return bool(os.environ.get("PGSERVICE")) or any(_of_query(url, "service"))


def _of_query(url: sa.URL, name: str) -> Iterator[str]:
    found = url.query.get(name, ())
    yield from (found,) if isinstance(found, str) else found
