"""The first release's tables. Its databases have them already, and are taken over at this revision."""

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None


def upgrade() -> None:
    position = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "scopes",
        sa.Column("scope", sa.Text, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "reflections",
        sa.Column("position", position, primary_key=True),
        sa.Column("reflection_id", sa.Text, nullable=False, unique=True),
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("experience_id", sa.Text, nullable=False),
        sa.Column("environment", sa.Text, nullable=False),
        sa.Column("task_id", sa.Text, nullable=False),
        sa.Column("policy_version", sa.BigInteger, nullable=False),
        sa.Column("reward_before", sa.Double, nullable=False),
        sa.Column("reward_after", sa.Double, nullable=False),
        sa.Column("success", sa.Boolean, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("created_microseconds", sa.BigInteger, nullable=False),
        sa.Column("deleted_version", sa.BigInteger),
    )
    op.create_index("retrieval", "reflections", ["scope", "environment", "success", "version"])
