"""Files that hold the key of an engine or an endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, SecretStr


def read_key(path: Path | None) -> SecretStr | None:
    """The only line of a file; None without a file. Raises ValueError, which does not name what it holds."""
    if path is None:
        return None
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {type(error).__name__}") from error
    if not key.isascii() or not key.isprintable() or not key or " " in key:
        raise ValueError(f"{path}: expected one line with a key, without spaces")
    return SecretStr(key)


def _with_key(path: Path) -> Path:
    read_key(path)
    return path


KeyFile = Annotated[Path, AfterValidator(_with_key)]
