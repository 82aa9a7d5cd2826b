"""One policy of a server, and requests to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mulligan.common.v1 import message_pb2
from mulligan.conformance.report import NotApplicable, demand
from mulligan.conformance.target import CheckSession
from mulligan.policy.v1 import policy_service_pb2 as pb

TOKEN_IDS = pb.FEATURE_TOKEN_IDS
LOG_PROBS = pb.FEATURE_LOG_PROBS
SCORE = pb.FEATURE_SCORE
_ROUNDING = 1e-4  # of a log-probability of a token that is certain
FEW = 8  # tokens


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """`tolerance` is the largest difference allowed between log-probabilities of one token under one version. `writes`
    allows checks that change what the server serves while they run."""

    tolerance: float = 0.1
    writes: bool = False


class Served:
    """The argument of the checks of one policy."""

    def __init__(self, session: CheckSession, policy: pb.Policy, options: PolicyOptions) -> None:
        self.session = session
        self.policy = policy
        self.options = options

    async def clean_up(self) -> None:
        await self.session.clean_up()

    def offers(self, *features: Any) -> bool:
        return set(features) <= set(self.policy.features)

    def need(self, *features: Any) -> None:
        """Raises NotApplicable if the policy lacks a feature."""
        for feature in features:
            if feature not in self.policy.features:
                raise NotApplicable(f"the policy does not offer {pb.Feature.Name(feature)}")

    def request(self, prompt: Any = None, **sampling: Any) -> pb.GenerateRequest:
        """A request for token ids, a Continuation, or else a short conversation."""
        asked = pb.GenerateRequest(
            request_id="conformance",
            policy=self.policy.name,
            sampling=pb.SamplingParams(**({"max_tokens": FEW} | sampling)),
        )
        if isinstance(prompt, pb.Continuation):
            asked.continuation.CopyFrom(prompt)
        elif isinstance(prompt, list):
            asked.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
        else:
            asked.messages.CopyFrom(pb.Messages(messages=[user("Say something.")]))
        return asked

    async def generate(self, request: pb.GenerateRequest) -> pb.GenerateResponse:
        """The answer. Raises Violation if its shape is wrong."""
        answer: pb.GenerateResponse = await self.session.ask("Generate", request)
        wanted = max(request.n, 1)
        demand(len(answer.completions) == wanted, f"{wanted} completions", answer, request)
        for completion in answer.completions:
            self.shape(completion, request)
        return answer

    def shape(self, completion: pb.Completion, request: pb.GenerateRequest) -> None:
        """Raises Violation if a sample breaks a rule that holds for all samples."""
        demand(completion.stop_reason != pb.STOP_REASON_UNSPECIFIED, "a stop_reason", completion, request)
        if not self.offers(TOKEN_IDS):
            demand(not completion.token_ids, "no token ids without FEATURE_TOKEN_IDS", completion, request)
            return
        count = len(completion.token_ids)
        limit = request.sampling.max_tokens
        demand(1 <= count <= limit, f"1 to {limit} sampled tokens (max_tokens)", completion, request)
        cut = completion.stop_reason == pb.STOP_REASON_MAX_TOKENS
        demand(not cut or count == limit, f"{limit} tokens where it stopped at max_tokens", completion, request)
        self.vocabulary("token_ids", completion.token_ids, request)
        self.log_probs(completion.log_probs, count if self.offers(LOG_PROBS) else 0, request)
        spans = sum(span.token_count for span in completion.policy_versions)
        demand(spans == count, f"version spans of {count} tokens together", f"{spans}: {completion}", request)
        closes = self.policy.end_of_turn_token_ids
        if completion.stop_reason == pb.STOP_REASON_END_OF_TURN and closes:
            last = completion.token_ids[-1]
            demand(last in closes, f"one of end_of_turn_token_ids, {list(closes)}, at the end", last, request)

    def vocabulary(self, what: str, token_ids: Any, request: Any) -> None:
        size = self.policy.vocabulary_size
        outside = [token for token in token_ids if token < 0 or (size and token >= size)]
        demand(not outside, f"{what} from 0 to below {size}, the vocabulary_size", f"{outside[:5]}", request)

    def log_probs(self, values: Any, count: int, request: Any) -> None:
        demand(len(values) == count, f"{count} log-probabilities", f"{len(values)}", request)
        wrong = [value for value in values if not math.isfinite(value) or value > _ROUNDING]
        demand(not wrong, "log-probabilities that are finite and at most 0", f"{wrong[:5]}", request)

    def close(self, found: Any, expected: Any, demanded: str, request: Any) -> None:
        """Raises Violation if two rows of log-probabilities differ by more than the tolerance."""
        apart = max((abs(one - other) for one, other in zip(found, expected, strict=True)), default=0.0)
        limit = self.options.tolerance
        demand(apart <= limit, f"{demanded}, within {limit:g} (--tolerance)", f"{apart:.3g} apart", request)

    def ids(self, count: int = 5) -> list[int]:
        """Some token ids of the vocabulary."""
        size = self.policy.vocabulary_size or 1000
        return [5 + (7 * n) % max(size - 6, 1) for n in range(count)] if size > 6 else [0] * count


def user(text: str) -> message_pb2.Message:
    return message_pb2.Message(role=message_pb2.ROLE_USER, content=text)


def difference(found: Any, expected: Any) -> str:
    return f"{list(found)}, not {list(expected)}"
