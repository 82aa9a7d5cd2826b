"""The five suites of security, each run whole: over TLS, by strangers, with faults of disk and clock, with callers that
vanish, and with hostile content. They are parts of `make test`; here it is counted what passed, and said what was
skipped for want of Docker, say.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mulligan.common.access import ACCESS
from proof.suite import ROOT, outcomes

SUITES: Mapping[str, Sequence[str]] = {
    "everything over TLS": (
        "tests/contract/common/test_tls.py",
        "tests/end_to_end/test_tls.py",
        "tests/unit/cli/test_certs.py",
        "tests/unit/common/test_tls.py",
    ),
    "a stranger at every service and at every rendering of compose and Kubernetes": (
        "tests/unit/common/test_access.py",
        "tests/unit/common/test_tokens.py",
        "tests/unit/common/test_run_credentials.py",
        "tests/unit/cli/test_local_tokens.py",
        "tests/contract/memory/test_run_credentials.py",
        "tests/contract/trainer/test_run_credentials.py",
        "tests/docker",
    ),
    "faults of disk and clock": (
        "tests/unit/common/test_state_files.py",
        "tests/unit/test_clocks.py",
        "tests/unit/testing/judge",
        "tests/contract/common/test_files.py",
        "tests/contract/memory/test_crashes.py",
        "tests/contract/trainer/test_damaged_runs.py",
        "tests/contract/testing",
        "tests/end_to_end/test_judge.py",
    ),
    "callers that vanish": (
        "tests/contract/common/test_vanishing_callers.py",
        "tests/contract/policy/test_uploads.py",
        "tests/contract/trainer/learner/test_leases.py",
    ),
    "hostile content, and what strangers can exhaust": (
        "tests/contract/common/test_strange_bytes.py",
        "tests/contract/common/test_strange_answers.py",
        "tests/contract/common/test_bad_input.py",
        "tests/contract/common/test_limits.py",
        "tests/contract/console/test_pages.py",
        "tests/contract/env/test_isolation.py",
        "tests/contract/env/test_untrusted.py",
        "tests/unit/env/test_sandbox_filter.py",
    ),
}


def run_suites(folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, (name, paths) in enumerate(SUITES.items()):
        begun = time.monotonic()
        report = folder / f"{number}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--numprocesses=2", f"--junit-xml={report}", *paths]
        subprocess.run(command, cwd=ROOT, check=False)
        found[name] = {**outcomes(report), "seconds": round(time.monotonic() - begun)}
        print(f"    {name}: {found[name]['passed']} passed, {len(found[name]['failed'])} failed", flush=True)
    roles = [role for calls in ACCESS.values() for role in calls.values()]
    counts = {str(role): roles.count(role) for role in dict.fromkeys(roles) if role is not None}
    return {"calls_by_least_role": counts, "calls_of_anyone": roles.count(None), "suites": found}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {"security": run_suites}
