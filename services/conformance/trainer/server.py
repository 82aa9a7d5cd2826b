"""What a trainer has as every service."""

from __future__ import annotations

from mulligan.trainer.v1 import run_service_pb2 as pb

from services.conformance import common
from services.conformance.report import Suite
from services.conformance.target import Session

suite: Suite[Session] = Suite()
FIRST = ("ListRuns", pb.ListRunsRequest(page_size=1))
common.add_credential(suite, *FIRST)
common.add_health(suite)
common.add_reflection(suite, "mulligan.trainer.v1.RunService", "mulligan.trainer.v1.LearnerService")
