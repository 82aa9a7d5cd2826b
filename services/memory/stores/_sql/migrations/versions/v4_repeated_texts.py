"""When the text of an entry was last written: among entries with equal evidence, the latest comes first."""

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"


def upgrade() -> None:
    op.add_column("standings", sa.Column("written", sa.BigInteger, nullable=False, server_default="0"))
    standings = sa.table("standings", *map(sa.column, ("text_id", "from_version", "written")))
    texts = sa.table("texts", *map(sa.column, ("id", "from_version")))
    began = sa.select(texts.c.from_version).where(texts.c.id == standings.c.text_id).scalar_subquery()
    op.execute(standings.update().values(written=sa.func.coalesce(began, standings.c.from_version)))
    op.drop_index("standings_uplift", "standings")
    is_open = sa.text("until_version IS NULL")
    columns = ["scope_id", "environment", "lower", "written", "position"]
    op.create_index("standings_uplift", "standings", columns, sqlite_where=is_open, postgresql_where=is_open)
