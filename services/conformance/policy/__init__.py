"""Checks of `policy_service.proto` and `policy_admin_service.proto`: of the server (`SERVER`), and of each policy
(`POLICY`), for the features that it offers."""

from __future__ import annotations

from mulligan.conformance.policy import admin, generate, many, refusals, scoring, server, stream
from mulligan.conformance.policy.served import Served
from mulligan.conformance.report import Suite
from mulligan.conformance.target import CheckSession

SERVER: Suite[CheckSession] = server.suite
POLICY: Suite[Served] = Suite()
POLICY.extend([generate.suite, many.suite, stream.suite, scoring.suite, refusals.suite, admin.suite])
