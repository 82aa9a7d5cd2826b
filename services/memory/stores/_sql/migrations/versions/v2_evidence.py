"""Standings, texts, evidence and the log of changes. Entries of before are rules without a key, never used."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.drop_index("retrieval", "reflections")
    op.rename_table("reflections", "old_reflections")
    op.rename_table("scopes", "old_scopes")
    _free_names()
    _entries()
    _texts()
    _standings()
    _experiments()
    _keep_statistics_free_of_texts()
    _copy()
    op.drop_table("old_reflections")
    op.drop_table("old_scopes")


def _free_names() -> None:
    """In PostgreSQL the indexes and sequences of a renamed table keep their names, which the new tables need."""
    if op.get_context().dialect.name == "postgresql":
        for old in ("reflections_pkey", "reflections_reflection_id_key", "scopes_pkey"):
            op.execute(f"ALTER INDEX {old} RENAME TO old_{old}")
        op.execute("ALTER SEQUENCE reflections_position_seq RENAME TO old_reflections_position_seq")


def _whole(name: str, **options: Any) -> Any:
    return sa.Column(name, sa.BigInteger, **{"nullable": False, **options})


def _id(name: str, **options: Any) -> Any:
    return sa.Column(name, _ID, **{"nullable": False, **options})


def _text(name: str, **options: Any) -> Any:
    return sa.Column(name, sa.Text, **{"nullable": False, **options})


def _real(name: str, **options: Any) -> Any:
    return sa.Column(name, sa.Double, **{"nullable": False, **options})


def _partial(name: str, table: str, columns: list[Any], where: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def _entries() -> None:
    op.create_table(
        "scopes", _id("id", primary_key=True), _text("name", unique=True), _whole("version"), _whole("entries")
    )
    op.create_table(
        "reflections",
        _id("position", primary_key=True),
        _text("reflection_id", unique=True),
        _id("scope_id"),
        _text("kind"),
        _text("run_id"),
        _text("experience_id"),
        _text("environment"),
        _text("task_id"),
        _whole("policy_version"),
        _real("reward_before"),
        _real("reward_after"),
        sa.Column("success", sa.Boolean, nullable=False),
        _whole("version"),
        _whole("created_microseconds"),
        _whole("deleted_version", nullable=True),
        _whole("erased_version", nullable=True),
        _id("standing_id"),
        _text("revised_by", nullable=True),
        _whole("revised_version", nullable=True),
    )
    op.create_index("reflections_of_scope", "reflections", ["scope_id", "position"])
    _partial("reflections_erased", "reflections", ["scope_id", "deleted_version"], "erased_version IS NOT NULL")
    op.create_table(
        "sources",
        _id("position", primary_key=True, autoincrement=False),
        sa.Column("place", sa.Integer, primary_key=True, autoincrement=False),
        _id("source"),
    )
    op.create_index("sources_of", "sources", ["source", "position"])


def _texts() -> None:
    embedding: Any = sa.LargeBinary
    if op.get_context().dialect.name == "postgresql":
        from pgvector.sqlalchemy import VECTOR

        embedding = VECTOR
    op.create_table(
        "texts",
        _id("id", primary_key=True),
        _id("scope_id"),
        _id("position"),
        _text("text"),
        sa.Column("embedding", embedding),
        _text("embedder", nullable=True),
        _whole("from_version"),
        _whole("until_version", nullable=True),
        sqlite_autoincrement=True,
    )
    op.create_index("texts_of_entry", "texts", ["position"])
    op.create_index("texts_opened", "texts", ["scope_id", "from_version"])
    op.create_index("texts_closed", "texts", ["scope_id", "until_version"])


def _standings() -> None:
    op.create_table(
        "standings",
        _id("id", primary_key=True),
        _id("position"),
        _id("scope_id"),
        _text("environment"),
        sa.Column("success", sa.Boolean, nullable=False),
        _real("gain"),
        _id("text_id"),
        _whole("revision"),
        _whole("evidence_since"),
        _text("status"),
        _text("key"),
        _text("tags"),
        _whole("uses_shown"),
        _whole("uses_left_out"),
        _real("mean_shown"),
        _real("mean_left_out"),
        _real("uplift", nullable=True),
        _real("lower"),
        _real("upper"),
        _whole("tries"),
        _whole("from_version"),
        _whole("until_version", nullable=True),
    )
    op.create_index("standings_closed", "standings", ["scope_id", "until_version"])
    op.create_index("standings_of_entry", "standings", ["position", "until_version"])
    orders: dict[str, list[Any]] = {
        "newest": ["position"],
        "success": ["success", "position"],
        "gain": ["success", "gain", "position"],
        "uplift": ["lower", "position"],
        "tries": ["tries", sa.text("position DESC")],
        "key": ["key", "position"],
    }
    for name, columns in orders.items():
        _partial(f"standings_{name}", "standings", ["scope_id", "environment", *columns], "until_version IS NULL")


def _experiments() -> None:
    op.create_table(
        "evidence",
        _id("position", primary_key=True, autoincrement=False),
        sa.Column("state", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "uses",
        _id("id", primary_key=True),
        _text("use_id", unique=True),
        _id("scope_id"),
        _text("use_key"),
        _id("left_out", nullable=True),
        _real("holdout"),
        _whole("drawn_microseconds"),
        _real("reward", nullable=True),
    )
    op.create_table(
        "used_entries",
        _id("use", primary_key=True, autoincrement=False),
        sa.Column("place", sa.Integer, primary_key=True, autoincrement=False),
        _id("position"),
        _whole("revision"),
    )
    op.create_index("uses_of_entry", "used_entries", ["position", "use"])
    op.create_table(
        "changes",
        _id("id", primary_key=True),
        _id("scope_id"),
        _whole("version"),
        _text("action"),
        _text("reflection_id"),
        _text("actor"),
        _whole("changed_microseconds"),
        _text("detail"),
    )
    op.create_index("changes_of_scope", "changes", ["scope_id", "id"])
    op.create_table("uncleaned", _text("reflection_id", primary_key=True))


def _keep_statistics_free_of_texts() -> None:
    """PostgreSQL's statistics have samples of a column's values, which an erasure would not reach."""
    if op.get_context().dialect.name == "postgresql":
        for table, column in (("texts", "text"), ("texts", "embedding"), ("standings", "key"), ("standings", "tags")):
            op.execute(f"ALTER TABLE {table} ALTER COLUMN {column} SET STATISTICS 0")


def _copy() -> None:
    """The first text and standing of an entry have its position as their id. When an entry was deleted is not known, so
    the log has additions alone."""
    op.execute(
        "INSERT INTO scopes (name, version, entries) "
        "SELECT s.scope, s.version, (SELECT count(*) FROM old_reflections r WHERE r.scope = s.scope "
        "AND r.deleted_version IS NULL) FROM old_scopes s ORDER BY s.scope"
    )
    kept = "run_id, experience_id, environment, task_id, policy_version, reward_before, reward_after, success"
    op.execute(
        f"INSERT INTO reflections (position, reflection_id, scope_id, kind, {kept}, version, created_microseconds, "
        f"deleted_version, standing_id) SELECT position, reflection_id, s.id, 'rule', {kept}, r.version, "
        "created_microseconds, deleted_version, position FROM old_reflections r JOIN scopes s ON s.name = r.scope "
        "ORDER BY position"
    )
    op.execute(
        "INSERT INTO texts (id, scope_id, position, text, from_version, until_version) "
        "SELECT position, s.id, position, text, r.version, deleted_version "
        "FROM old_reflections r JOIN scopes s ON s.name = r.scope ORDER BY position"
    )
    op.execute(
        "INSERT INTO standings (id, position, scope_id, environment, success, gain, text_id, revision, evidence_since, "
        "status, key, tags, uses_shown, uses_left_out, mean_shown, mean_left_out, lower, upper, tries, from_version, "
        "until_version) SELECT position, position, s.id, environment, success, reward_after - reward_before, position, "
        "1, 1, 'candidate', '', '', 0, 0, 0, 0, -1, 1, 0, r.version, deleted_version "
        "FROM old_reflections r JOIN scopes s ON s.name = r.scope ORDER BY position"
    )
    op.execute(
        "INSERT INTO changes (scope_id, version, action, reflection_id, actor, changed_microseconds, detail) "
        "SELECT s.id, r.version, 'add', reflection_id, '', created_microseconds, '' "
        "FROM old_reflections r JOIN scopes s ON s.name = r.scope ORDER BY position"
    )
