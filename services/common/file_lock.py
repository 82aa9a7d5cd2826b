"""A lock that one process holds on a file."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO


def lock_file(path: Path) -> IO[bytes]:
    """Opens the file, creates it if need be, and holds a lock on it until it is closed or the process ends.

    Raises BlockingIOError when another process holds the lock, and OSError when the file cannot be opened or locked.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file
