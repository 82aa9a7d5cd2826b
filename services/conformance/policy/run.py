"""Runs the policy suite against a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mulligan.conformance.policy import POLICY, SERVER
from mulligan.conformance.policy.served import PolicyOptions, Served
from mulligan.conformance.report import Report, Result, run_suite
from mulligan.conformance.target import CheckSession, Target, TargetUnreachable
from mulligan.policy.v1 import policy_admin_service_pb2_grpc as admin_grpc
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc


def target(address: str, **options: Any) -> Target:
    return Target(address, pb_grpc.PolicyServiceStub, admin_grpc.PolicyAdminServiceStub, **options)


async def check(
    target: Target,
    options: PolicyOptions,
    *,
    only: str = "",
    policy: str = "",
    on_result: Callable[[Result], None] = lambda result: None,
) -> Report:
    """All checks of the server, then all of each policy, or of one. Raises TargetUnreachable."""
    listed = (await target.connect("ListPolicies", pb.ListPoliciesRequest(page_size=1000))).policies
    chosen = [found for found in listed if not policy or found.name == policy]
    if policy and not chosen:
        names = ", ".join(found.name for found in listed)
        raise TargetUnreachable(f"{target.address} serves no policy {policy!r}; there are: {names}")
    report = Report("policy", target.address)
    await run_suite(report, SERVER, CheckSession(target), only=only, on_result=on_result)
    for found in chosen:
        served = Served(CheckSession(target), found, options)
        await run_suite(report, POLICY, served, subject=found.name, only=only, on_result=on_result)
    return report
