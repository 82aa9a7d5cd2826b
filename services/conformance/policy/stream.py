"""Checks of StreamGenerate: the same as Generate, token by token."""

from __future__ import annotations

from typing import Any

from mulligan.conformance.policy.served import LOG_PROBS, TOKEN_IDS, Served
from mulligan.conformance.report import Suite, Violation, demand
from mulligan.conformance.target import Refusal, as_demanded
from mulligan.policy.v1 import policy_service_pb2 as pb

suite: Suite[Served] = Suite()


async def streamed(served: Served, request: pb.GenerateRequest) -> list[pb.StreamGenerateResponse]:
    served.need(pb.FEATURE_STREAM)
    asked = pb.StreamGenerateRequest(request=request)
    parts: Any = await served.session.stream("StreamGenerate", asked)
    if isinstance(parts, Refusal):
        raise Violation("this call is answered", parts, asked)
    demand(bool(parts), "at least one message", "none", asked)
    return list(parts)


def joined(parts: list[pb.StreamGenerateResponse]) -> pb.Completion:
    """The sample that these messages add up to."""
    whole = pb.Completion(stop_reason=parts[-1].stop_reason)
    for part in parts:
        whole.token_ids.extend(part.token_ids)
        whole.log_probs.extend(part.log_probs)
        whole.policy_versions.extend(part.policy_versions)
        whole.text += part.text
    return whole


@suite.check("StreamGenerate", "the messages of a sample make the answer that Generate gives")
async def same_answer(served: Served) -> None:
    request = served.request(temperature=0.0, max_tokens=24)
    parts = await streamed(served, request)
    whole = joined(parts)
    served.shape(whole, request)
    expected = await served.generate(request)
    plain = expected.completions[0]
    same = (list(whole.token_ids), whole.text, whole.stop_reason)
    demand(same == (list(plain.token_ids), plain.text, plain.stop_reason), f"{plain}", whole, request)
    prompt = list(parts[0].prompt_token_ids) == list(expected.prompt_token_ids)
    demand(prompt, "prompt_token_ids as in GenerateResponse, in the first message", parts[0], request)


@suite.check("StreamGenerate", "prompt_token_ids come in the first message alone, a stop_reason ends each sample")
async def samples(served: Served) -> None:
    request = served.request(temperature=1.0)
    request.n = 3
    parts = await streamed(served, request)
    late = [part for part in parts[1:] if part.prompt_token_ids]
    demand(not late, "prompt_token_ids in the first message alone", late[:1], request)
    indices = {part.index for part in parts}
    demand(indices == {0, 1, 2}, "samples 0, 1 and 2", f"{sorted(indices)}", request)
    for index in range(3):
        own = [part for part in parts if part.index == index]
        ends = [part.stop_reason != pb.STOP_REASON_UNSPECIFIED for part in own]
        demand(
            ends == [False] * (len(own) - 1) + [True], "a stop_reason in a sample's last message alone", ends, request
        )
        served.shape(joined(own), request)


@suite.check("StreamGenerate", "each message has as many log-probabilities and versions as tokens")
async def messages(served: Served) -> None:
    served.need(pb.FEATURE_STREAM, TOKEN_IDS)
    request = served.request(max_tokens=24)
    for part in await streamed(served, request):
        count = len(part.token_ids)
        served.log_probs(part.log_probs, count if served.offers(LOG_PROBS) else 0, request)
        spans = sum(span.token_count for span in part.policy_versions)
        demand(spans == count, f"version spans of {count} tokens together", part, request)


@suite.check("StreamGenerate", "it is refused as Generate is")
async def refused(served: Served) -> None:
    served.need(pb.FEATURE_STREAM)
    empty = pb.GenerateRequest(policy=served.policy.name, messages=pb.Messages())
    request = pb.StreamGenerateRequest(request=empty)
    answer = await served.session.stream("StreamGenerate", request)
    as_demanded(answer, request, "INVALID_ARGUMENT", "EMPTY_PROMPT", "field")
