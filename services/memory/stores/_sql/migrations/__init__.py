"""The schema of a database, revision by revision, for Alembic. A revision that was released is never changed."""
