"""HTTP proxies of the environment do not come between services on loopback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mulligan.testing.processes import ServiceProcesses
from tests.support.paths import IMPORT_ROOTS, ROOT


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY"])
def test_a_service_on_loopback_answers_whatever_proxy_is_set(services: ServiceProcesses, variable: str) -> None:
    """A health check and a command, each a process of its own. Nothing listens where the proxy is said to be."""
    address = services.start("env").address
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {variable: "http://127.0.0.1:9", "PYTHONPATH": IMPORT_ROOTS}
    for command in (
        ["mulligan.common.healthcheck", address],
        ["mulligan.cli", "conformance", "env", "--target", address, "--only", "ListEnvironments"],
    ):
        ended = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
