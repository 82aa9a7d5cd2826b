"""OpenEnv (openenv-core from PyPI), for comparison and for the tests of the adapter; `make openenv` installs it.

Nothing here is imported from OpenEnv: it has an environment of its own, and is reached over its protocol.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")


class NotInstalled(RuntimeError):
    """The environment that `make openenv` creates is not there."""


def version() -> str:
    """Of openenv-core, as pinned."""
    pins = dict(line.split("==") for line in REQUIREMENTS.read_text().splitlines() if "==" in line)
    return pins["openenv-core"].strip()


def python() -> Path:
    """The interpreter of OpenEnv's environment. Raises NotInstalled."""
    path = ROOT / ".stamps" / f"openenv-{version()}" / "bin" / "python"
    if not path.exists():
        raise NotInstalled(f"OpenEnv {version()} is not installed: run `make openenv`")
    return path


def environment() -> dict[str, str]:
    """Environment variables with which OpenEnv's interpreter finds `benchmarks` and `mulligan`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}


@contextmanager
def serving() -> Iterator[str]:
    """Serves FrozenLake with OpenEnv in a process of its own while the block runs; the value is "http://HOST:PORT".

    An action is `{"text": …}`, an observation `{"text", "reading", "truncated", "feedback"}`; `reset(seed=N)` starts
    board `train/N`.
    """
    command = [str(python()), "-m", "benchmarks.openenv.server"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"OpenEnv's server ended with status {process.wait()}")
            yield f"http://{json.loads(line)['address']}"
        finally:
            process.kill()
