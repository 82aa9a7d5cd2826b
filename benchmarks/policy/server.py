"""Starts and ends a real SGLang server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mulligan.testing.sglang_servers import CPU_ENVIRONMENT, CPU_FLAGS

_START_SECONDS = 900.0
_LOG_END = 4000  # characters that an error shows


@contextmanager
def sglang_server(python: str, model: Path, folder: Path, *, device: str, flags: Sequence[str]) -> Iterator[str]:
    """Yields the server's address when it is ready. Kills all its processes at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--incremental-streaming-output"]
    command += [*(CPU_FLAGS if device == "cpu" else ("--dtype", "bfloat16")), *flags]
    variables = CPU_ENVIRONMENT if device == "cpu" else {"HF_HUB_OFFLINE": "1"}
    log = folder / "sglang.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | variables, stdout=output, stderr=output, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(process, address, log)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{address}/ready", timeout=5) as answer:
            if answer.status == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(
                f"SGLang is not ready; its log ends with:\n{log.read_text(errors='replace')[-_LOG_END:]}"
            )
        time.sleep(0.2)
