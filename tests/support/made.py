"""What `make` installs beside the Python packages: where it is, and what a test does where it is not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def installed(variable: str, target: str) -> Path:
    """The path that the Makefile's `variable` holds and `make TARGET` installs.

    Skips the test where it is not there; fails it in CI.
    """
    path = ROOT / (os.environ.get(variable) or _value(variable))
    if path.exists():
        return path
    message = f"not installed: `make {target}` installs it"
    if "CI" in os.environ:
        pytest.fail(message)
    pytest.skip(message)


def buf() -> Path:
    """Lints the contracts, and calls servers as grpcurl does."""
    return installed("BUF", "buf")


def _value(variable: str) -> str:
    command = ["make", "--silent", "--no-print-directory", f"--eval=show: ; @echo $({variable})", "show"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
