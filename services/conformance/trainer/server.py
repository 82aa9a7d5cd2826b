"""Checks of a trainer that every service has."""

from __future__ import annotations

from mulligan.conformance import common
from mulligan.conformance.report import Suite
from mulligan.conformance.target import CheckSession
from mulligan.trainer.v1 import run_service_pb2 as pb

suite: Suite[CheckSession] = Suite()
FIRST = ("ListRuns", pb.ListRunsRequest(page_size=1))
common.add_credential(suite, *FIRST)
common.add_roles(suite, "StopRun", pb.StopRunRequest(run_id="no-such-run"))
common.add_health(suite)
common.add_reflection(suite, "mulligan.trainer.v1.RunService", "mulligan.trainer.v1.LearnerService")
