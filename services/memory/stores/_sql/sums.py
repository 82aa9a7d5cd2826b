"""What the column `crc` of a table covers (`row_sums.py`).

All that a row says: of an entry its id, provenance, times and sources; of a text the text, its entry and when it was
read; of a standing status, key, tags, what it knows of the evidence, and its versions; of a scope its name, version and
number of entries; of a use its reward, and its entries with their revisions; and each line of the log of writes. Not
covered are ids that the database counts up, which the rows that refer to them have; and embeddings, which only order
the answers of a search, and are computed from the texts. The evidence has a checksum of its own (`evidence.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from mulligan.common.row_sums import RowDamage, is_sound, row_sum
from mulligan.memory.stores._sql.tables import answered, changes, reflections, scopes, standings, texts, uses

_NOT_COVERED = {
    scopes: {"id"},
    reflections: set[str](),
    texts: {"id", "embedding", "embedder"},
    answered: set[str](),
    standings: {"id"},
    uses: {"id"},
    changes: {"id"},
}
COVERED: dict[sa.Table, tuple[sa.Column[Any], ...]] = {
    table: tuple(column for column in table.c if column.name not in {"crc", *others})
    for table, others in _NOT_COVERED.items()
}
_DAMAGE = "damage"
_BATCH = 1000  # rows


def _same(value: Any) -> Any:
    return value


def _real(value: Any) -> float:
    return float(value) + 0.0  # SQLite has no -0.0


def _as_read(column: sa.Column[Any]) -> Callable[[Any], Any]:
    """What makes of a value that is written the one that is read."""
    kinds: tuple[tuple[type[Any], Callable[[Any], Any]], ...] = (
        (sa.Boolean, bool),
        (sa.Double, _real),
        (sa.Integer, int),
    )
    return next((make for kind, make in kinds if isinstance(column.type, kind)), _same)


_AS_READ = {table: [(column.name, _as_read(column)) for column in columns] for table, columns in COVERED.items()}


def sealed(table: sa.Table, values: Mapping[str, Any], *more: Any, sound: bool = True) -> dict[str, Any]:
    """A row to write, with its checksum, which also covers `more`. What replaces a damaged row stays damaged."""
    row = dict(values)
    for name, make in _AS_READ[table]:
        value = row.get(name)
        row[name] = None if value is None else make(value)
    crc = row_sum([*(row[name] for name, _ in _AS_READ[table]), *more]) if sound else None
    return {**row, "crc": crc}


class Section:
    """The columns of one table in a statement of several: those that the checksum covers, and it, one after another
    from `begin` on. The names of columns that are in `taken` get the prefix."""

    def __init__(self, table: sa.Table, begin: int = 0, prefix: str = "", taken: Sequence[Section] = ()):
        self.table = table
        names = {column.name for section in taken for column in section.columns}
        named = [*COVERED[table], table.c.crc]
        self.columns: list[sa.Label[Any]] = [
            column.label(prefix * (column.name in names) + column.name) for column in named
        ]
        self.end = begin + len(self.columns)
        self._begin = begin
        self._crc = self.end - 1

    def is_sound(self, row: sa.Row[Any], *more: Any) -> bool:
        values = row[self._begin : self._crc]
        return is_sound((*values, *more) if more else values, row[self._crc])

    def values(self, row: sa.Row[Any]) -> dict[str, Any]:
        return {column.name: value for column, value in zip(COVERED[self.table], row[self._begin :], strict=False)}


def tell_damaged(db: sa.Connection) -> None:
    """Reads all rows but those of uses, and tells which are damaged. Reads that ask for what a damaged row should say
    would not find it."""
    for table in COVERED:
        if table is uses:
            continue
        section = Section(table)
        (key,) = table.primary_key
        wanted = sa.select(*section.columns, key.label("row_key")).execution_options(yield_per=_BATCH)
        for row in db.execute(wanted):
            if not section.is_sound(row):
                damage_of(db).tell(f"row {row.row_key!r} of {table.name}")


def source_sum(source_ids: Sequence[str]) -> int:
    return row_sum(source_ids) if source_ids else 0


def with_damage(damage: RowDamage) -> dict[str, Any]:
    """Options of an engine, whose connections then know `damage_of`."""
    return {_DAMAGE: damage}


def damage_of(db: sa.Connection) -> RowDamage:
    found = db.get_execution_options()[_DAMAGE]
    assert isinstance(found, RowDamage)
    return found
