"""Embeds the texts that have no embedding, or one by another embedder."""

from __future__ import annotations

import sqlalchemy as sa

from mulligan.memory.embedder import Embedder
from mulligan.memory.stores._sql.tables import texts

_BATCH = 256  # texts


def embed_some(db: sa.Connection, embedder: Embedder, after: int) -> int | None:
    """Embeds some texts with a greater id than `after`. Returns the last one's id; None if there are none left. Raises
    CannotEmbed."""
    by_another = sa.or_(texts.c.embedder.is_(None), texts.c.embedder != embedder.name)
    wanted = sa.select(texts.c.id, texts.c.text).where(texts.c.id > after, by_another)
    rows = db.execute(wanted.order_by(texts.c.id).limit(_BATCH)).all()
    if not rows:
        return None
    vectors = embedder.embed([row.text for row in rows])
    embedded = texts.update().where(texts.c.id == sa.bindparam("text_id"))
    values = {"embedding": sa.bindparam("vector"), "embedder": embedder.name}
    pairs = zip(rows, vectors, strict=True)
    db.execute(embedded.values(**values), [{"text_id": row.id, "vector": vector} for row, vector in pairs])
    return int(rows[-1].id)
