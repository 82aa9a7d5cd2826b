"""Task files in settings: one file, or a pattern such as `train-*.parquet`."""

from __future__ import annotations

import os
from glob import glob
from pathlib import Path


def matching(path: str) -> list[Path]:
    """The file, or all files that match the pattern, sorted by name; empty if there is none."""
    if os.path.isfile(path):
        return [Path(path)]
    return sorted(found for found in map(Path, glob(path, recursive=True)) if found.is_file())


def required(setting: str, path: str) -> list[Path]:
    """As `matching`; an empty path gives no files. Raises ValueError, which names the setting, if no file matches."""
    found = matching(path) if path else []
    if path and not found:
        inside = f"; it is a folder: name files in it, as {Path(path) / '*'}" if os.path.isdir(path) else ""
        raise ValueError(f"{setting}: no such file: {path}{inside}")
    return found
