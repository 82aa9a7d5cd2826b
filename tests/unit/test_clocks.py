"""The wall clock may jump, so nothing waits, expires or is measured by it: services read it for records alone."""

from __future__ import annotations

import ast
from pathlib import PurePosixPath

import pytest

from tests.support.paths import ROOT

CLOCKS = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "clock_gettime", "clock_gettime_ns"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
}
# What reads it, and for what. Orders come from numbers, never from these times.
RECORDS = {
    "services/common/certificates.py": "from when to when a certificate is good",
    "services/common/run_credentials.py": "until when a credential is good",
    "services/cli/doctor/command.py": "whether certificates are good, and whether records lie in the future",
    "services/cli/train.py": "the name of a run",
    "services/conformance/memory/entries.py": "whether a server's clock is this one's",
    "services/conformance/memory/log.py": "whether a server's clock is this one's",
    "services/console/report.py": "when a report was written",
    "services/memory/stores/_sql/writes.py": "when an entry was written",
    "services/policy/deployment.py": "when a version began to serve",
    "services/testing/judge/network.py": "the deadline of a call, which is passed on",
    "services/trainer/events.py": "when an event came",
    "services/trainer/folder.py": "when a run began",
    "services/trainer/manager.py": "when a run began: later than the one before, even if the clock was set back",
}
DEADLINES = "time_remaining"  # of gRPC's: computed with the wall clock, so only whether there is one may be asked


def readings(source: str) -> list[str]:
    """The places that read the wall clock, or compute with a deadline that does."""
    found = []
    tree = ast.parse(source)
    asked = {id(node.left) for node in ast.walk(tree) if isinstance(node, ast.Compare) and _is_none(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            names = {alias.name for alias in node.names} & CLOCKS["time"]
            found += [f"line {node.lineno}: from time import {name}" for name in sorted(names)]
        elif isinstance(node, ast.Attribute) and node.attr in CLOCKS.get(_last(node.value), ()):
            found.append(f"line {node.lineno}: {_last(node.value)}.{node.attr}")
        elif isinstance(node, ast.Call) and _last(node.func) == DEADLINES and id(node) not in asked:
            found.append(f"line {node.lineno}: {DEADLINES}")
    return found


def _is_none(node: ast.Compare) -> bool:
    return all(isinstance(other, ast.Constant) and other.value is None for other in node.comparators)


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_only_records_have_the_time_of_the_wall_clock() -> None:
    files = [path for path in (ROOT / "services").rglob("*.py") if not {"v1", "buf"} & set(path.parts)]
    found = {str(PurePosixPath(path.relative_to(ROOT))): readings(path.read_text()) for path in files}
    assert len(found) > 300
    assert {path: places for path, places in found.items() if places and path not in RECORDS} == {}
    assert {path for path, places in found.items() if places} == set(RECORDS)


@pytest.mark.parametrize(
    ("planted", "noticed"),
    [
        ("import time\ndeadline = time.time() + 5", True),
        ("import time\nclock = time.time", True),
        ("from time import time_ns", True),
        ("from datetime import datetime\nage = datetime.now() - begun", True),
        ("import datetime\nage = datetime.datetime.now(datetime.UTC)", True),
        ("left = context.time_remaining() / 2", True),
        ("bounded = context.time_remaining() is not None", False),
        ("import time\ndeadline = time.monotonic() + 5", False),
        ("now = loop.time()", False),
        ("from time import monotonic", False),
    ],
)
def test_a_planted_reading_is_noticed(planted: str, noticed: bool) -> None:
    assert bool(readings(planted)) is noticed
