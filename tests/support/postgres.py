"""The PostgreSQL server of tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mulligan.testing.postgres import NoPostgres, PostgresServer, postgres_server
from tests.support.found import require_postgres


@contextmanager
def postgres_for_tests() -> Iterator[PostgresServer]:
    """Skips the test, or fails it, where there is none."""
    try:
        with postgres_server() as server:
            yield server
    except NoPostgres as problem:
        require_postgres(f"no PostgreSQL to test with: {problem}")
