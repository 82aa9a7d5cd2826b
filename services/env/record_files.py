"""Reads data sets of records: a JSON array, JSON lines or Parquet, recognised by content. JSON may be compressed by
bzip2 or gzip."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeVar, cast

import msgspec

from mulligan.env.base import MissingExtra

_PARQUET = b"PAR1"
_BATCH = 1_000  # rows of a Parquet file in memory at a time
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EXPECTED = "expected a JSON array of records, a JSON object in each line, or Parquet"
T = TypeVar("T")


def read_records(path: Path, kind: type[T]) -> Iterator[tuple[str, T]]:
    """Yields each record with its place (file and line) for error messages. `kind` is a msgspec.Struct, or `dict`.

    Raises ValueError, which names the place and what was expected, and MissingExtra for Parquet without pyarrow.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start == _PARQUET:
            yield from _parquet(path, kind)
            return
        with _opened(path, start) as lines:
            yield from _json(path, lines, kind)
    except (OSError, EOFError) as error:  # EOFError: a truncated compressed file
        raise ValueError(f"{path} cannot be read: {error}") from error


def _opened(path: Path, start: bytes) -> IO[bytes]:
    if start.startswith(b"BZh"):
        return bz2.BZ2File(path)
    return cast(IO[bytes], gzip.GzipFile(path)) if start.startswith(b"\x1f\x8b") else path.open("rb")


def _json(path: Path, lines: IO[bytes], kind: type[T]) -> Iterator[tuple[str, T]]:
    decoder = msgspec.json.Decoder(kind)
    is_first = True
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(_BYTE_ORDER_MARK).strip()
        place = f"{path}:{number}"
        if text.startswith(b"[") and is_first:
            yield from _array(path, text + b"\n" + lines.read(), kind)
        elif text:
            is_first = False
            try:
                yield place, decoder.decode(text)
            except msgspec.ValidationError as error:
                raise ValueError(f"{place}: {error}") from error
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{place}: {error}; {_EXPECTED}") from error


def _array(path: Path, content: bytes, kind: type[T]) -> Iterator[tuple[str, T]]:
    try:
        records = msgspec.json.decode(content, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON array: {error}") from error
    decoder = msgspec.json.Decoder(kind)
    for index, raw in enumerate(records):
        place = f"{path}: record {index}"
        try:
            yield place, decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{place}: {error}") from error


def _parquet(path: Path, kind: type[T]) -> Iterator[tuple[str, T]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra("parquet", error) from error
    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if issubclass(kind, msgspec.Struct):  # only what it uses
                wanted = {field.encode_name for field in msgspec.structs.fields(kind)}
                columns = [name for name in columns if name in wanted]
            for batch in file.iter_batches(_BATCH, columns=columns):
                for row in batch.to_pylist():
                    yield f"{path}: row {index}", msgspec.convert(row, kind)
                    index += 1
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: row {index}: {error}") from error
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file that can be read: {error}") from error
