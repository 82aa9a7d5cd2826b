"""Where a setting names a file of tasks: one file, or a pattern such as `train-*.parquet` for several."""

from __future__ import annotations

from glob import glob
from pathlib import Path


def matching(path: str) -> list[Path]:
    """The file, or all that a pattern stands for, in order of their names; empty when there is none."""
    if Path(path).is_file():
        return [Path(path)]
    return sorted(found for found in map(Path, glob(path, recursive=True)) if found.is_file())


def required(setting: str, path: str) -> list[Path]:
    """Raises ValueError that names the setting when there is no such file. An empty path is none."""
    found = matching(path) if path else []
    if path and not found:
        inside = f"; it is a folder: name files in it, as {Path(path) / '*'}" if Path(path).is_dir() else ""
        raise ValueError(f"{setting}: no such file: {path}{inside}")
    return found
