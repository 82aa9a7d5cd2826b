"""Checksums of the rows of databases. Damage of a row costs what the row says, and is told.

A table has a column `crc`: the CRC-32 of zlib of the row's other values, in MessagePack. It is written with each write
and compared with each read. A row without one is damaged: where earlier releases wrote none, a migration added it.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog

from mulligan.common.errors import DomainError, Reason

_log = structlog.get_logger()
_encode = msgspec.msgpack.Encoder().encode
_DAMAGED = ("malformed", "file is not a database")  # in messages
_MOST_TOLD = 10_000  # records; a database of which more are damaged is told already

# Reads text that is not UTF-8 as well: it differs from what was written, so the row's checksum tells.
any_text = partial(str, encoding="utf-8", errors="surrogateescape")


def row_sum(values: Sequence[Any]) -> int:
    return zlib.crc32(_encode(values))


def is_sound(values: Sequence[Any], crc: Any) -> bool:
    """Whether a row has the values with which its checksum was written."""
    try:
        return bool(zlib.crc32(_encode(values)) == crc)
    except (UnicodeEncodeError, OverflowError):
        return False


def is_damage(error: BaseException) -> bool:
    """Whether the database says that its file is damaged."""
    return isinstance(error, sqlite3.DatabaseError) and any(text in str(error) for text in _DAMAGED)


def structure_problems(db: sqlite3.Connection) -> list[str]:
    """What is wrong with the database's pages. Indexes that differ from their tables are made anew before."""
    if not (found := _integrity(db)):
        return []
    try:
        db.execute("REINDEX")
    except sqlite3.DatabaseError:
        return found
    if not (left := _integrity(db)):
        _log.warning("damaged indexes of a database were made anew", file=_file(db), problem=found[0])
    return left


def _integrity(db: sqlite3.Connection) -> list[str]:
    try:
        found = db.execute("PRAGMA integrity_check(5)").fetchall()
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            return [str(error)]
        raise
    lines = [line for (text,) in found for line in str(text).splitlines()]
    return [] if lines == ["ok"] else lines


def _file(db: sqlite3.Connection) -> str:
    return str(db.execute("PRAGMA database_list").fetchone()[2])


class RowDamage:
    """Of one database: tells each damaged record once in the log."""

    def __init__(self, database: str | Path, advice: str):
        self.database = database
        self._advice = advice
        self._told: set[str] = set()

    def tell(self, record: str, cause: str = "its checksum differs") -> None:
        if record not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(record)
            _log.error("a record is damaged", file=str(self.database), record=record, problem=cause)

    def error(self, record: str, cause: str = "its checksum differs") -> DomainError:
        """Also tells it."""
        self.tell(record, cause)
        message = f"{record} in {self.database} is damaged: {cause}. {self._advice}"
        return DomainError(Reason.STATE_DAMAGED, message, file=self.database, record=record)

    def of_file(self, error: Exception) -> DomainError:
        """Of what SQLite says of its file."""
        self.tell("the file", str(error))
        message = f"{self.database} is damaged: {error}. What is whole of it stays readable. {self._advice}"
        return DomainError(Reason.STATE_DAMAGED, message, file=self.database)
