"""Strange messages and torn HTTP/2 for each call of a service: no answer that the contract does not have, no crash, and
no more memory or log than the calls explain.

It is what `tests/contract/common/test_strange_bytes.py` does in seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ("env", "policy", "memory", "trainer")
SECONDS = 900  # of messages to each service; half as many of torn HTTP/2
TESTS = "tests/contract/common/test_strange_bytes.py"


def fuzz(service: str, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    chosen = f"(descriptors or torn) and {service}"
    command = [sys.executable, "-m", "pytest", "-q", TESTS, "-k", chosen, "--timeout", str(4 * SECONDS)]
    result = subprocess.run(
        [*command, f"--junit-xml={report.resolve()}"],
        cwd=ROOT,
        env=os.environ | {"MULLIGAN_TEST_FUZZ_SECONDS": str(SECONDS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4_000:]
    return {
        case.attrib["name"]: {one.attrib["name"]: int(one.attrib["value"]) for one in case.iter("property")}
        for case in ElementTree.parse(report).iter("testcase")
    }


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {f"fuzz-{service}": partial(fuzz, service) for service in SERVICES}
