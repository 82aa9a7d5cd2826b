"""Fixtures that all suites share: real service processes, whose logs are shown when a test fails."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch when it is imported: waiting threads do not spin

import gc
import signal
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from mulligan.testing.processes import ServiceProcesses

# A shell that runs the suite in the background has it ignore interrupts; the programs under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes depends on what else the machine does.
settings.register_profile("thorough", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100)
settings.register_profile("tests", settings.get_profile("thorough"), max_examples=30)
settings.register_profile("quick", settings.get_profile("thorough"), max_examples=20)  # of `make unit`
settings.load_profile("tests")
# By default structlog has rich format tracebacks, with all local variables: seconds of computing for each.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)
_LONG = ("backends/sglang", "tests/docker", "tests/end_to_end", "tests/examples", "trainer/learner", "tests/contract")
_ONE_SERVER = ("tests.support.sglang ", "tests.support.policy_backends ")


@cache
def _scope(file: str) -> str:
    """A module's tests share its services; and all that use the one SGLang server change its weights."""
    imports = Path(file).read_text()
    return "sglang" if any(f"from {helper}import" in imports for helper in _ONE_SERVER) else file


class _OneProcessPerServer(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    def _split_scope(self, nodeid: str) -> str:
        return _scope(nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Where several processes run the tests. (The scheduler by marks changes ids in a way that pytest 9.2 ignores.)"""
    return _OneProcessPerServer(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that take long come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: next((place for place, begin in enumerate(_LONG) if begin in item.nodeid), len(_LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported here lives as long as the process: the garbage collector does not visit it again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def nothing_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests find no services that their user runs, and no tokens of that user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        for variable in ("MULLIGAN_CLI_TOKEN", "MULLIGAN_CLI_TOKEN_FILE", "MULLIGAN_CLI_READER_TOKEN"):
            patch.delenv(variable, raising=False)
        yield


@pytest.fixture(autouse=True)
def same_umask() -> Iterator[None]:
    """Commands that run in this process make their files private; later tests are as before."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcesses]:
    """Starts services for one test: `services.start("env", max_episodes=2).address`."""
    running = ServiceProcesses(tmp_path_factory.mktemp("services"), forked=True)
    yield running
    running.end()


@pytest.fixture(scope="module")
def shared_services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcesses]:
    """Services that all tests of a module use; a test must not stop them."""
    running = ServiceProcesses(tmp_path_factory.mktemp("services"), forked=True)
    yield running
    running.end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, ServiceProcesses):
                report.sections.append(("logs of the services", value.logs()))
    return report
