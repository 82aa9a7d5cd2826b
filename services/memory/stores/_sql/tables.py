"""The tables. `migrations/` makes them in a database; a test compares the two.

An entry is a row of `reflections`, which has what never changes of it. Each change of anything else closes its row of
`standings` and opens a new one, so a version of a scope consists of the standings with
from_version <= version < until_version. An open row has no until_version. The indexes that begin with a scope and an
environment hold open rows alone, in the order of one retrieval each: the newest version is read by a short walk. `crc`
is the checksum of a row (`sums.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

metadata = sa.MetaData()


class Characters(sa.TypeDecorator[str]):
    """Any text. PostgreSQL takes no character 0; there it is written as two others."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        if value is None or dialect.name != "postgresql":
            return value
        return value.replace("\x1a", "\x1a1").replace("\x00", "\x1a0")

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> str | None:
        if value is None or dialect.name != "postgresql":
            return value
        return value.replace("\x1a0", "\x00").replace("\x1a1", "\x1a")

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> Any:
        """None elsewhere: a call for each value that is read would take longer than to read it."""
        return super().result_processor(dialect, coltype) if dialect.name == "postgresql" else None


class Embedding(sa.TypeDecorator[Any]):
    """A vector of float32: pgvector's type in PostgreSQL, else its bytes, the lowest first."""

    impl = sa.LargeBinary
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> Any:
        if dialect.name != "postgresql":
            return dialect.type_descriptor(sa.LargeBinary())
        from pgvector.sqlalchemy import VECTOR

        return dialect.type_descriptor(VECTOR())

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        if value is None or dialect.name == "postgresql":
            return value
        return np.asarray(value, "<f4").tobytes()

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        if value is None or dialect.name == "postgresql":
            return value
        try:
            return np.frombuffer(value, "<f4")
        except (ValueError, TypeError):
            return np.full(1, np.nan, "<f4")  # damaged


class place_in(FunctionElement[int]):  # noqa: N801 - it reads as a function of SQL
    """place_in(text, part): where `part` begins in `text`, from 1; 0 if it is not there. Exact in case and bytes."""

    type = sa.Integer()
    inherit_cache = True


@compiles(place_in, "sqlite")
def _instr(element: Any, compiler: SQLCompiler, **options: Any) -> str:
    return f"instr({compiler.process(element.clauses, **options)})"


@compiles(place_in, "postgresql")
def _strpos(element: Any, compiler: SQLCompiler, **options: Any) -> str:
    return f"strpos({compiler.process(element.clauses, **options)})"


Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite counts up only what is called INTEGER

scopes = sa.Table(
    "scopes",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("name", Characters, nullable=False, unique=True),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("entries", sa.BigInteger, nullable=False),  # that are not deleted
    sa.Column("crc", sa.BigInteger),
)

reflections = sa.Table(
    "reflections",
    metadata,
    sa.Column("position", Id, primary_key=True),  # in the order of adding
    sa.Column("reflection_id", sa.Text, nullable=False, unique=True),
    sa.Column("scope_id", Id, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("run_id", Characters, nullable=False),
    sa.Column("experience_id", Characters, nullable=False),
    sa.Column("environment", Characters, nullable=False),
    sa.Column("task_id", Characters, nullable=False),
    sa.Column("policy_version", sa.BigInteger, nullable=False),
    sa.Column("reward_before", sa.Double, nullable=False),
    sa.Column("reward_after", sa.Double, nullable=False),
    sa.Column("success", sa.Boolean, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("created_microseconds", sa.BigInteger, nullable=False),
    sa.Column("deleted_version", sa.BigInteger),  # an erased entry has it, too
    sa.Column("erased_version", sa.BigInteger),
    sa.Column("standing_id", Id, nullable=False),  # the newest
    sa.Column("revised_by", Characters),  # request that made the newest revision; none made the first
    sa.Column("revised_version", sa.BigInteger),
    sa.Column("source_sum", sa.BigInteger),  # the checksum of the ids of its sources
    sa.Column("crc", sa.BigInteger),
    sa.Index("reflections_of_scope", "scope_id", "position"),
)
sa.Index(
    "reflections_erased",
    reflections.c.scope_id,
    reflections.c.deleted_version,
    sqlite_where=reflections.c.erased_version.is_not(None),
    postgresql_where=reflections.c.erased_version.is_not(None),
)

# A text of an entry, for as long as the entry was kept with it.
texts = sa.Table(
    "texts",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("scope_id", Id, nullable=False),
    sa.Column("position", Id, nullable=False),
    sa.Column("text", Characters, nullable=False),
    sa.Column("embedding", Embedding),
    sa.Column("embedder", Characters),
    sa.Column("from_version", sa.BigInteger, nullable=False),
    sa.Column("until_version", sa.BigInteger),
    sa.Column("digest", sa.Text),  # `store.text_digest`; none in a closed row of an older schema
    sa.Column("crc", sa.BigInteger),
    sa.Index("texts_of_entry", "position"),
    sa.Index("texts_opened", "scope_id", "from_version"),
    sa.Index("texts_closed", "scope_id", "until_version"),
    sqlite_autoincrement=True,  # the id of an erased text is not used again
)
sa.Index(
    "texts_known",
    texts.c.scope_id,
    texts.c.digest,
    sqlite_where=texts.c.until_version.is_(None),
    postgresql_where=texts.c.until_version.is_(None),
)

# Calls that added nothing, because their text was known, and the entry that was their answer.
answered = sa.Table(
    "answered",
    metadata,
    sa.Column("request", sa.Text, primary_key=True),  # the id that a new entry would have got
    sa.Column("position", Id, nullable=False),
    sa.Column("content", sa.Text, nullable=False),  # `store.request_digest`; empty once the entry is erased
    sa.Column("crc", sa.BigInteger),
    sa.Index("answered_with", "position"),
)

standings = sa.Table(
    "standings",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("position", Id, nullable=False),
    sa.Column("scope_id", Id, nullable=False),
    sa.Column("environment", Characters, nullable=False),
    sa.Column("success", sa.Boolean, nullable=False),
    sa.Column("gain", sa.Double, nullable=False),
    sa.Column("text_id", Id, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("evidence_since", sa.BigInteger, nullable=False),  # revision
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("key", Characters, nullable=False),
    sa.Column("tags", sa.Text, nullable=False),  # as `tags.py` writes them
    sa.Column("uses_shown", sa.BigInteger, nullable=False),
    sa.Column("uses_left_out", sa.BigInteger, nullable=False),
    sa.Column("mean_shown", sa.Double, nullable=False),
    sa.Column("mean_left_out", sa.Double, nullable=False),
    sa.Column("uplift", sa.Double),
    sa.Column("lower", sa.Double, nullable=False),
    sa.Column("upper", sa.Double, nullable=False),
    sa.Column("tries", sa.BigInteger, nullable=False),  # what Order.FEWEST_USES counts
    sa.Column("written", sa.BigInteger, nullable=False),  # the version that last wrote the text
    sa.Column("from_version", sa.BigInteger, nullable=False),
    sa.Column("until_version", sa.BigInteger),
    sa.Column("crc", sa.BigInteger),
    sa.Index("standings_closed", "scope_id", "until_version"),
    sa.Index("standings_of_entry", "position", "until_version"),
)


def _of_open_rows(name: str, *columns: Any) -> None:
    is_open = standings.c.until_version.is_(None)
    begin = (standings.c.scope_id, standings.c.environment)
    sa.Index(name, *begin, *columns, sqlite_where=is_open, postgresql_where=is_open)


_of_open_rows("standings_newest", standings.c.position)
_of_open_rows("standings_success", standings.c.success, standings.c.position)
_of_open_rows("standings_gain", standings.c.success, standings.c.gain, standings.c.position)
_of_open_rows("standings_uplift", standings.c.lower, standings.c.written, standings.c.position)
_of_open_rows("standings_tries", standings.c.tries, standings.c.position.desc())
_of_open_rows("standings_key", standings.c.key, standings.c.position)

# Of the newest standing of an entry: `evidence.py` as bytes.
evidence = sa.Table(
    "evidence",
    metadata,
    sa.Column("position", Id, primary_key=True, autoincrement=False),
    sa.Column("state", sa.LargeBinary, nullable=False),
)

# What an entry was made from.
sources = sa.Table(
    "sources",
    metadata,
    sa.Column("position", Id, primary_key=True, autoincrement=False),
    sa.Column("place", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("source", Id, nullable=False),  # the position of that entry
    sa.Index("sources_of", "source", "position"),
)

uses = sa.Table(
    "uses",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("use_id", sa.Text, nullable=False, unique=True),
    sa.Column("scope_id", Id, nullable=False),
    sa.Column("use_key", Characters, nullable=False),
    sa.Column("left_out", Id),  # the position of the entry
    sa.Column("holdout", sa.Double, nullable=False),
    sa.Column("drawn_microseconds", sa.BigInteger, nullable=False),
    sa.Column("reward", sa.Double),
    sa.Column("crc", sa.BigInteger),
)

used_entries = sa.Table(
    "used_entries",
    metadata,
    sa.Column("use", Id, primary_key=True, autoincrement=False),
    sa.Column("place", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", Id, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Index("uses_of_entry", "position", "use"),
)

changes = sa.Table(
    "changes",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("scope_id", Id, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("reflection_id", sa.Text, nullable=False),
    sa.Column("actor", Characters, nullable=False),
    sa.Column("changed_microseconds", sa.BigInteger, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("crc", sa.BigInteger),
    sa.Index("changes_of_scope", "scope_id", "id"),
)

# Erased entries of which the store's files may still have bytes, also after a crash.
uncleaned = sa.Table("uncleaned", metadata, sa.Column("reflection_id", sa.Text, primary_key=True))
