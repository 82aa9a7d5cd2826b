"""Where buf is: `make buf` installs it, and `make test` runs that first where there is npm."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def buf() -> Path:
    """Skips the test on a machine without npm, and fails it where buf could be there."""
    places = sorted(ROOT.glob(".stamps/buf-*/node_modules/.bin/buf"))
    path = ROOT / os.environ["BUF"] if "BUF" in os.environ else places[-1] if places else None
    if path is not None and path.exists():
        return path
    if shutil.which("npm") is None and "CI" not in os.environ:
        pytest.skip("buf comes from npm, which this machine does not have; `make check` lints the contracts elsewhere")
    pytest.fail("buf is not installed: run `make buf`")
