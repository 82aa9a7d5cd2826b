"""One loop for all examples: four live services with the embedded model, and with tokens as `mulligan up` makes them,
which the examples find by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mulligan.cli.local_tokens import LocalTokens, announced
from mulligan.common.config import SERVICES
from mulligan.testing.loop import Loop
from mulligan.testing.processes import ServiceProcesses
from tests.support.examples import Program, go, typescript


@pytest.fixture(scope="session")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    folder = tmp_path_factory.mktemp("examples")
    services = ServiceProcesses(folder, forked=True)
    tokens = LocalTokens(folder)
    tokens.make()
    settings: dict[str, Any] = dict(tokens.settings())
    try:
        loop = Loop.start(services, folder, **settings)
        with announced({getattr(loop, name).address: tokens.of(name) for name in SERVICES}):
            yield loop
    finally:
        services.end()


@pytest.fixture(scope="session")
def addresses(loop: Loop) -> dict[str, str]:
    """What the command line and the clients read."""
    return {
        "MULLIGAN_CLI_ENV": loop.env.address,
        "MULLIGAN_CLI_POLICY": loop.policy.address,
        "MULLIGAN_CLI_MEMORY": loop.memory.address,
        "MULLIGAN_CLI_TRAINER": loop.trainer.address,
    }


@pytest.fixture(scope="session", params=["typescript", "go"])
def client(
    request: pytest.FixtureRequest, addresses: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Program:
    """The client in each language, told where the services are."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "go":
        return Program(["./client"], go(folder), addresses)
    contracts = {"PROTO": str(folder / "contracts")}
    return Program(["node", "dist/client/main.js"], typescript(folder), {**addresses, **contracts})
