"""Brings a database to the schema of this release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory

from mulligan.memory.store import StoreError

NEWEST = 5  # the schema of this release: the last revision in migrations/versions
_FIRST_RELEASE = "schema_version"  # the table that had its number


def migrate(connection: sa.Connection, name: str) -> None:
    """Runs the missing revisions in the caller's transaction. Raises StoreError, with the database's name in it, for
    one of another program or of a newer release."""
    tables = set(sa.inspect(connection).get_table_names())
    schema = _schema(connection, tables)
    if schema is None:
        raise StoreError(f"database: {name} belongs to another program")
    if schema > NEWEST:
        raise StoreError(
            f"database: {name} has schema {schema}, and this program knows schemas up to {NEWEST}: "
            "use a newer release, or another database"
        )
    if schema < NEWEST:
        _run(connection, of_first_release=_FIRST_RELEASE in tables)


def _schema(connection: sa.Connection, tables: set[str]) -> int | None:
    """0 for an empty database, None for one that is not of this program."""
    if not tables:
        return 0
    if "alembic_version" in tables:
        number = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        return int(number) if number is not None and number.isdigit() and "reflections" in tables else None
    if _FIRST_RELEASE in tables:
        return int(connection.execute(sa.text("SELECT version FROM schema_version")).scalar_one())
    return None


def _run(connection: sa.Connection, of_first_release: bool) -> None:
    folder = Path(__file__).parent / "migrations"
    script = ScriptDirectory(str(folder), version_locations=[str(folder / "versions")])

    def missing(revision: Any, context: Any) -> Any:
        return script._upgrade_revs("head", revision)

    with EnvironmentContext(Config(), script, fn=missing) as environment:
        environment.configure(connection=connection, transactional_ddl=True)
        if of_first_release:
            environment.get_context().stamp(script, "1")
            connection.execute(sa.text(f"DROP TABLE {_FIRST_RELEASE}"))
        environment.run_migrations()
