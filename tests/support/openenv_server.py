"""OpenEnv's own server, with FrozenLake behind it, in its own environment (`make openenv`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.paths import IMPORT_ROOTS, ROOT


@contextmanager
def openenv_server(log: Path) -> Iterator[str]:
    """Its address, host:port. Without `make openenv` the test fails: nothing else says that the adapter works."""
    pins = (ROOT / "benchmarks" / "openenv" / "requirements.txt").read_text()
    version = re.search(r"^openenv-core==(.+)$", pins, re.MULTILINE)
    assert version, "benchmarks/openenv/requirements.txt pins no openenv-core"
    python = ROOT / ".stamps" / f"openenv-{version[1]}" / "bin" / "python"
    assert python.exists(), f"OpenEnv is not installed in {python.parents[1]}: run `make openenv`"
    with log.open("wb") as written:
        process = subprocess.Popen(
            [python, "-m", "benchmarks.openenv.server"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": IMPORT_ROOTS},
            stdout=subprocess.PIPE,
            stderr=written,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, f"OpenEnv's server ended: {log.read_text()}"
            yield json.loads(line)["address"]
        finally:
            process.kill()
            process.wait()
