"""Fixtures that all suites share: real service processes, whose logs are shown when a test fails."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch when it is imported: waiting threads do not spin

from collections.abc import Generator, Iterator

import pytest

from tests.support.processes import Services

_ONE_AT_A_TIME = {"tests.support.sglang": "sglang", "tests.support.policy_backends": "sglang"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes run the tests, a module's stay together, for they share its services; and so do all that
    use the one SGLang server, whose weights they change."""
    for item in items:
        module = getattr(item, "module", None)
        helpers = {getattr(value, "__module__", "") for value in vars(module).values()} if module else set()
        shared = next((group for helper, group in _ONE_AT_A_TIME.items() if helper in helpers), item.path.name)
        item.add_marker(pytest.mark.xdist_group(shared))


@pytest.fixture
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Starts services for one test: `services.start("env", max_episodes=2).address`."""
    running = Services(tmp_path_factory.mktemp("services"))
    yield running
    running.end()


@pytest.fixture(scope="module")
def shared_services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Services that all tests of a module use; a test must not stop them."""
    running = Services(tmp_path_factory.mktemp("services"))
    yield running
    running.end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Services):
                report.sections.append(("logs of the services", value.logs()))
    return report
