"""Checksums of rows. What a database holds by now is taken as it is."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from mulligan.common.row_sums import row_sum
from mulligan.memory.stores._sql.tables import Characters

revision = "5"
down_revision = "4"

_BATCH = 1000  # rows
_COVERED = {
    "scopes": "name version entries",
    "reflections": "position reflection_id scope_id kind run_id experience_id environment task_id policy_version "
    "reward_before reward_after success version created_microseconds deleted_version erased_version standing_id "
    "revised_by revised_version source_sum",
    "texts": "scope_id position text from_version until_version digest",
    "answered": "request position content",
    "standings": "position scope_id environment success gain text_id revision evidence_since status key tags "
    "uses_shown uses_left_out mean_shown mean_left_out uplift lower upper tries written from_version until_version",
    "uses": "use_id scope_id use_key left_out holdout drawn_microseconds reward",
    "changes": "scope_id version action reflection_id actor changed_microseconds detail",
}
_KEYS = {"reflections": "position", "answered": "request"}
_CHARACTERS = (
    *("name", "run_id", "experience_id", "environment", "task_id", "revised_by"),
    *("text", "key", "use_key", "actor"),
)


def upgrade() -> None:
    op.add_column("reflections", sa.Column("source_sum", sa.BigInteger))
    for table in _COVERED:
        op.add_column(table, sa.Column("crc", sa.BigInteger))
    fill(op.get_bind())


def fill(db: sa.Connection) -> None:
    """Also tests call it."""
    _sum_sources(db)
    for name in _COVERED:
        _sum_rows(db, name)


def _column(name: str) -> Any:
    if name in _CHARACTERS:
        return sa.column(name, Characters)
    return sa.column(name, sa.Boolean if name == "success" else None)


def _sum_sources(db: sa.Connection) -> None:
    entries = sa.table("reflections", *map(sa.column, ("position", "reflection_id", "source_sum")))
    db.execute(entries.update().values(source_sum=0))
    sources = sa.table("sources", *map(sa.column, ("position", "place", "source")))
    wanted = (
        sa.select(sources.c.position, entries.c.reflection_id)
        .join_from(sources, entries, entries.c.position == sources.c.source)
        .order_by(sources.c.position, sources.c.place)
    )
    found: dict[int, list[str]] = {}
    for position, source in db.execute(wanted):
        found.setdefault(position, []).append(source)
    filled = entries.update().where(entries.c.position == sa.bindparam("of")).values(source_sum=sa.bindparam("sum"))
    if found:
        db.execute(filled, [{"of": position, "sum": row_sum(ids)} for position, ids in found.items()])


def _sum_rows(db: sa.Connection, name: str) -> None:
    columns = _COVERED[name].split()
    key = _KEYS.get(name, "id")
    table = sa.table(name, sa.column(key), sa.column("crc"), *(_column(one) for one in columns if one != key))
    wanted = sa.select(table.c[key].label("of"), *(table.c[one].label(f"of_{one}") for one in columns))
    filled = table.update().where(table.c[key] == sa.bindparam("of")).values(crc=sa.bindparam("sum"))
    last: Any = None
    while rows := db.execute(_after(wanted, table.c[key], last)).all():
        entries = _entries(db, [row[0] for row in rows]) if name == "uses" else None
        sums = [row_sum([*row[1:], *([entries.get(row[0], [])] if entries is not None else [])]) for row in rows]
        db.execute(filled, [{"of": row[0], "sum": found} for row, found in zip(rows, sums, strict=True)])
        last = rows[-1][0]


def _after(wanted: sa.Select[Any], key: Any, last: Any) -> sa.Select[Any]:
    return (wanted if last is None else wanted.where(key > last)).order_by(key).limit(_BATCH)


def _entries(db: sa.Connection, uses: list[int]) -> dict[int, list[list[int]]]:
    """The entries of uses, with their revisions."""
    used = sa.table("used_entries", *map(sa.column, ("use", "place", "position", "revision")))
    wanted = sa.select(used.c.use, used.c.position, used.c.revision).where(used.c.use.in_(uses))
    found: dict[int, list[list[int]]] = {}
    for use, position, revision in db.execute(wanted.order_by(used.c.use, used.c.place)):
        found.setdefault(use, []).append([position, revision])
    return found
