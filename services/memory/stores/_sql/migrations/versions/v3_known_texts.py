"""Texts that are known: their digests, and the calls that added nothing because of them."""

import sqlalchemy as sa
from alembic import op

from mulligan.memory.store import text_digest
from mulligan.memory.stores._sql.tables import Characters

revision = "3"
down_revision = "2"

_BATCH = 1000  # texts


def upgrade() -> None:
    op.add_column("texts", sa.Column("digest", sa.Text))
    op.create_table(
        "answered",
        sa.Column("request", sa.Text, primary_key=True),
        sa.Column("position", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("content", sa.Text, nullable=False),
    )
    op.create_index("answered_with", "answered", ["position"])
    if op.get_context().dialect.name == "postgresql":  # as in v2: statistics have samples of values
        for table, column in (("texts", "digest"), ("answered", "content")):
            op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET STATISTICS 0")
    _fill()
    is_open = sa.text("until_version IS NULL")
    op.create_index("texts_known", "texts", ["scope_id", "digest"], sqlite_where=is_open, postgresql_where=is_open)


def _fill() -> None:
    """The digests of all texts that entries have now."""
    db = op.get_bind()
    texts = sa.table(
        "texts",
        *map(sa.column, ("id", "position", "until_version", "digest")),
        sa.column("text", Characters),
    )
    reflections = sa.table("reflections", *map(sa.column, ("position", "kind")), sa.column("environment", Characters))
    wanted = (
        sa.select(texts.c.id, texts.c.text, reflections.c.kind, reflections.c.environment)
        .join(reflections, reflections.c.position == texts.c.position)
        .where(texts.c.until_version.is_(None))
        .order_by(texts.c.id)
        .limit(_BATCH)
    )
    filled = texts.update().where(texts.c.id == sa.bindparam("of")).values(digest=sa.bindparam("found"))
    done = 0
    while rows := db.execute(wanted.where(texts.c.id > done)).all():
        db.execute(filled, [{"of": row.id, "found": text_digest(row.environment, row.kind, row.text)} for row in rows])
        done = rows[-1].id
