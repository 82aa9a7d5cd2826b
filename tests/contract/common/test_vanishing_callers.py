"""Callers that vanish at each moment of a call leave nothing behind, and whoever repeats the call gets its answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog

from mulligan.common.access import ACCESS, AccessRole
from tests.support import vanishing_env, vanishing_learner, vanishing_memory, vanishing_policy, vanishing_runs
from tests.support.vanishing import Case, Vanishing
from tests.support.waiting import until

CASES: Mapping[str, Case] = {
    **vanishing_env.CASES,
    **vanishing_memory.CASES,
    **vanishing_policy.CASES,
    **vanishing_runs.CASES,
    **vanishing_learner.CASES,
}
_SEE_ONLY = (None, AccessRole.READER)  # roles that change nothing
CHANGING = [
    f"/{service}/{call}" for service, calls in ACCESS.items() for call, role in calls.items() if role not in _SEE_ONLY
]
STREAMS_OF_READERS = ["/mulligan.trainer.v1.RunService/WatchRun"]


def test_every_case_is_of_a_call_that_changes_something_or_streams() -> None:
    assert set(CASES) <= {*CHANGING, *STREAMS_OF_READERS}


@pytest.mark.parametrize("method", [*CHANGING, *STREAMS_OF_READERS])
async def test_nothing_is_left(method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each case looks at the state of its service. Nothing goes on for nobody, and the log has no exception."""
    assert method in CASES, f"no caller of {method} vanishes: add a case to tests/support/vanishing_*.py"
    complaints: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    before = asyncio.all_tasks()
    caller = Vanishing()
    with structlog.testing.capture_logs() as lines:
        await CASES[method](tmp_path, caller)
        assert caller.left[method] > 0, "its caller has vanished, at least once"
        await until(lambda: asyncio.all_tasks() <= before)
    complaints += [line for line in lines if line["log_level"] in ("error", "critical") or line.get("exc_info")]
    complaints += [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert complaints == []
