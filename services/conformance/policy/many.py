"""Checks of GenerateMany: the same as Generate, for many requests."""

from __future__ import annotations

from typing import Any

from mulligan.conformance.policy.served import Served
from mulligan.conformance.report import NotApplicable, Suite, Violation, demand
from mulligan.conformance.target import Refusal
from mulligan.policy.v1 import policy_service_pb2 as pb

suite: Suite[Served] = Suite()
_COUNT = 5


async def answered(served: Served, requests: list[pb.GenerateRequest]) -> list[pb.GenerateManyResponse.Item]:
    """The items in the order of the requests. Raises Violation unless there is one for each."""
    asked = pb.GenerateManyRequest(requests=requests)
    messages: Any = await served.session.stream("GenerateMany", asked)
    if isinstance(messages, Refusal):
        if messages.code == "UNIMPLEMENTED":
            raise NotApplicable("the server leaves GenerateMany out")
        raise Violation("this call is answered", messages, asked)
    demand(all(message.items for message in messages), "at least one item in each message", messages, asked)
    items = [item for message in messages for item in message.items]
    indices = sorted(item.index for item in items)
    demand(indices == list(range(len(requests))), "one item for each request", indices, asked)
    return sorted(items, key=lambda item: item.index)


@suite.check("GenerateMany", "each request has one item: the answer that Generate gives")
async def same_answers(served: Served) -> None:
    requests = [served.request(temperature=0.0, max_tokens=1 + number) for number in range(_COUNT)]
    for request, item in zip(requests, await answered(served, requests), strict=True):
        demand(item.WhichOneof("result") == "response", "a response", item, request)
        expected = await served.generate(request)
        demand(len(item.response.completions) == 1, "one completion", item, request)
        [found], [plain] = item.response.completions, expected.completions
        served.shape(found, request)
        same = (list(found.token_ids), found.text, found.stop_reason)
        demand(same == (list(plain.token_ids), plain.text, plain.stop_reason), f"{plain}", found, request)
        prompt = list(item.response.prompt_token_ids) == list(expected.prompt_token_ids)
        demand(prompt, "prompt_token_ids as Generate has them", item, request)


@suite.check("GenerateMany", "a request that is refused has the error of Generate, and the others are answered")
async def one_refused(served: Served) -> None:
    requests = [served.request() for _ in range(_COUNT)]
    requests[2] = pb.GenerateRequest(policy=served.policy.name, messages=pb.Messages())
    for request, item in zip(requests, await answered(served, requests), strict=True):
        refused = request is requests[2]
        demand(item.WhichOneof("result") == ("error" if refused else "response"), "its own result", item, request)
        if refused:
            told = item.error.reason == "EMPTY_PROMPT" and "field" in item.error.metadata
            demand(told, "EMPTY_PROMPT with metadata `field`", item, request)
            demand(item.error.code == 3, "code 3, INVALID_ARGUMENT", item, request)


@suite.check("GenerateMany", "a request that is malformed, or no request at all, is INVALID_ARGUMENT INVALID_FIELD")
async def malformed(served: Served) -> None:
    await answered(served, [served.request()])
    bad = served.request()
    bad.n = -1
    for requests, field in (([], "requests"), ([served.request(), bad], "requests[1].n")):
        asked = pb.GenerateManyRequest(requests=requests)
        found = await served.session.stream("GenerateMany", asked)
        named = isinstance(found, Refusal) and found.metadata.get("field") == field
        right = isinstance(found, Refusal) and (found.code, found.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        demand(named and right, f"INVALID_ARGUMENT INVALID_FIELD whose metadata `field` is {field!r}", found, asked)
