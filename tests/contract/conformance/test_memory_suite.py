"""The memory suite: it passes on a store of another package with an embedder, and notices each planted violation."""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest

from mulligan.conformance.memory import additions, erasing, labels, log, revisions, strategies, uses
from mulligan.conformance.memory import run as memory
from mulligan.conformance.report import Report, Verdict
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from tests.support.distribution import install
from tests.support.faulty_memory import FirstContract, MemoryFault
from tests.support.faulty_proxy import Fault, between, faults


@pytest.fixture(scope="module")
def server(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> ServiceProcess:
    installed = install(tmp_path_factory.mktemp("installed"))
    environment = {"PYTHONPATH": os.pathsep.join([str(installed), *filter(None, sys.path)])}
    return shared_services.start("memory", environment=environment, database="notes:desk", embedder="wordllama")


async def checked(address: str, only: str = "") -> Report:
    target = memory.target(address)
    report = await memory.check(target, only=only)
    await target.close()
    return report


async def test_a_server_without_a_fault_conforms(server: ServiceProcess) -> None:
    report = await checked(server.address)
    assert report.conforms, report.problems()
    assert {result.why for result in report.of(Verdict.NOT_APPLICABLE)} == {
        "no token was given: the server seems to have none",
        "no token of a reader was given (MULLIGAN_CLI_READER_TOKEN)",
    }


def test_each_check_of_what_came_later_has_a_planted_violation() -> None:
    parts = (additions, labels, strategies, revisions, erasing, uses, log)
    later = [check.title for part in parts for check in part.suite.checks]
    assert set(later) <= {fault.title for fault in faults(MemoryFault)}


async def test_a_server_of_the_first_contract_conforms_and_is_said_to_lack_the_rest(server: ServiceProcess) -> None:
    async with between(server.address, FirstContract()) as address:
        report = await checked(address)
    assert report.conforms, report.problems()
    lacking = Counter(result.why for result in report.of(Verdict.NOT_APPLICABLE))
    assert lacking["the server leaves ListChanges out"] > 25
    assert len(report.of(Verdict.PASSED)) > 15


@pytest.mark.parametrize("kind", faults(MemoryFault), ids=lambda kind: kind.__name__)
async def test_a_violation_is_noticed(server: ServiceProcess, kind: type[Fault]) -> None:
    async with between(server.address, kind()) as address:
        report = await checked(address, kind.title)
    assert kind.title in {result.title for result in report.violations}, report.results
