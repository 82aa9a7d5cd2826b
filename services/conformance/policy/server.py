"""Checks of a policy server, whatever it serves."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from mulligan.conformance import common
from mulligan.conformance.policy.served import user
from mulligan.conformance.report import Suite, demand
from mulligan.conformance.target import CheckSession, all_pages, as_demanded
from mulligan.policy.v1 import policy_admin_service_pb2 as admin_pb
from mulligan.policy.v1 import policy_service_pb2 as pb

suite: Suite[CheckSession] = Suite()
DEFAULT = pb.GetPolicyRequest()


async def names(session: CheckSession) -> list[str]:
    return [policy.name for policy in (await session.ask("ListPolicies", pb.ListPoliciesRequest())).policies]


@suite.check("ListPolicies", "it lists each policy once, under a name, and the default one among them")
async def listed(session: CheckSession) -> None:
    found = await names(session)
    demand(all(found) and len(set(found)) == len(found), "names, each once", found)
    default = (await session.ask("GetPolicy", DEFAULT)).policy
    demand(default.name in found or len(found) >= 100, "the default policy in the list", f"{default.name!r}: {found}")
    same = (await session.ask("GetPolicy", pb.GetPolicyRequest(policy=default.name))).policy
    demand(same.name == default.name, f"{default.name!r}, asked for by name", same)


@suite.check("ListPolicies", "page by page it lists the same policies")
async def pages(session: CheckSession) -> None:
    expected = await names(session)
    found: list[str] = []
    async for page in all_pages(
        lambda token: session.ask("ListPolicies", pb.ListPoliciesRequest(page_size=1, page_token=token))
    ):
        demand(len(page.policies) <= 1, "a page of at most one policy", f"{len(page.policies)} policies")
        found += [policy.name for policy in page.policies]
        if len(found) > len(expected):
            break
    demand(found == expected, f"{expected} in pages of one", found)


@suite.check("ListPolicies", "a bad page token or size is INVALID_ARGUMENT")
async def bad_pages(session: CheckSession) -> None:
    for token in ("no such token", "é🧊", "\x00"):
        request = pb.ListPoliciesRequest(page_token=token)
        await session.refused("ListPolicies", request, "INVALID_ARGUMENT", "BAD_PAGE_TOKEN")
    for size in (-1, 1001):
        await session.bad_field("ListPolicies", pb.ListPoliciesRequest(page_size=size), "page_size")


@suite.check("GetPolicy", "an unknown policy is NOT_FOUND UNKNOWN_POLICY, in every call")
async def unknown(session: CheckSession) -> None:
    name = f"no-such-policy-{uuid4()}"
    messages = pb.Messages(messages=[user("Hello.")])
    generate = pb.GenerateRequest(policy=name, messages=messages)
    for method, request in (
        ("GetPolicy", pb.GetPolicyRequest(policy=name)),
        ("Generate", generate),
        ("Tokenize", pb.TokenizeRequest(policy=name, messages=messages)),
        ("Score", pb.ScoreRequest(policy=name, sequences=[pb.TokenIds(ids=[1, 2])])),
    ):
        await session.refused(method, request, "NOT_FOUND", "UNKNOWN_POLICY")
    stream: Any = pb.StreamGenerateRequest(request=generate)
    as_demanded(await session.stream("StreamGenerate", stream), stream, "NOT_FOUND", "UNKNOWN_POLICY")


@suite.check("GetPolicy", "a name that is too long is INVALID_ARGUMENT INVALID_FIELD")
async def long_name(session: CheckSession) -> None:
    await session.bad_field("GetPolicy", pb.GetPolicyRequest(policy="p" * 201), "policy")


common.add_credential(suite, "GetPolicy", DEFAULT)
common.add_roles(suite, "UnloadModel", admin_pb.UnloadModelRequest(policy="no-such-policy"))
common.add_health(suite)
common.add_reflection(suite, "mulligan.policy.v1.PolicyService", "mulligan.policy.v1.PolicyAdminService")
