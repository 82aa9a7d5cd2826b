"""The conformance suites: they pass on our servers, through the command, and notice each planted violation."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from services.conformance.env.game import Options
from services.conformance.env.run import check as check_env
from services.conformance.env.run import target as env_target
from services.conformance.report import Report, Verdict
from tests.support import faulty_env
from tests.support.processes import ROOT

PARITY = Options(actions=40, known=("1", "3", "5", "6"))


def command(*arguments: str, token: str = "") -> tuple[int, dict[str, Any], str]:
    """Exit status, the JSON report, and what it wrote to stderr."""
    process = subprocess.run(
        [sys.executable, "-m", "services.cli", "conformance", *arguments, "--json"],
        cwd=ROOT,
        env={**__import__("os").environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'proto' / 'gen'}", "MULLIGAN_CLI_TOKEN": token},
        capture_output=True,
        text=True,
        check=False,
    )
    return process.returncode, json.loads(process.stdout) if process.stdout else {}, process.stderr


async def env_report(kind: type[faulty_env.Faulty], only: str = "", **how: bool) -> Report:
    async with faulty_env.served(kind, **how) as address:
        target = env_target(address, timeout=10.0)
        report = await check_env(target, PARITY, only=only)
        await target.close()
    return report


async def test_a_server_without_a_fault_conforms() -> None:
    report = await env_report(faulty_env.NoFault)
    assert report.conforms and len(report.of(Verdict.PASSED)) > 55, report.problems()


@pytest.mark.parametrize("kind", faulty_env.kinds(), ids=lambda kind: kind.__name__)
async def test_a_violation_of_the_env_contract_is_noticed(kind: type[faulty_env.Faulty]) -> None:
    report = await env_report(kind, kind.title)
    assert [result.title for result in report.violations] == [kind.title], report.results
