"""What an import brings with it."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.paths import ROOT


def modules_after(statement: str) -> list[str]:
    """Names of all modules that are loaded once a fresh interpreter has run the statement."""
    result = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sorted(sys.modules))"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()
