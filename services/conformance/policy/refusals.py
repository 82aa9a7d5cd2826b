"""Checks of what a policy must refuse, and with which reason."""

from __future__ import annotations

import json
from typing import Any

from mulligan.conformance.policy.served import SCORE, TOKEN_IDS, Served, user
from mulligan.conformance.report import NotApplicable, Suite, demand
from mulligan.conformance.target import as_demanded
from mulligan.policy.v1 import policy_service_pb2 as pb

suite: Suite[Served] = Suite()
LONGEST = 300_000  # tokens of a context that a check fills


@suite.check("Generate", "an option that needs an absent feature is INVALID_ARGUMENT UNSUPPORTED_OPTION, and named")
async def unsupported(served: Served) -> None:
    options: dict[int, dict[str, Any]] = {
        pb.FEATURE_TOP_K: {"top_k": 5},
        pb.FEATURE_SEED: {"seed": 1},
        pb.FEATURE_STOP_TOKEN_IDS: {"stop_token_ids": [1]},
        pb.FEATURE_REGEX: {"regex": "a+"},
        pb.FEATURE_JSON_SCHEMA: {"json_schema": json.dumps({"type": "string"})},
    }
    asked: list[tuple[str, str, Any]] = [
        (f"sampling.{next(iter(option))}", "Generate", served.request(**option))
        for feature, option in options.items()
        if not served.offers(feature)
    ]
    name = served.policy.name
    if not served.offers(pb.FEATURE_PRIORITY):
        request = served.request()
        request.priority = 1
        asked.append(("priority", "Generate", request))
    if not served.offers(TOKEN_IDS):
        asked.append(("token_ids", "Generate", served.request([5, 6])))
        asked.append(("continuation", "Generate", served.request(pb.Continuation(token_ids=[5], messages=[user("A")]))))
        messages = pb.Messages(messages=[user("A")])
        asked.append(("messages", "Tokenize", pb.TokenizeRequest(policy=name, messages=messages)))
    if not served.offers(SCORE):
        score = pb.ScoreRequest(policy=name, sequences=[pb.TokenIds(ids=[5, 6])])
        asked.append(("sequences", "Score", score))
    elif not served.offers(pb.FEATURE_SCORE_TEMPERATURE):
        score = pb.ScoreRequest(policy=name, sequences=[pb.TokenIds(ids=[5, 6])], temperature=0.5)
        asked.append(("temperature", "Score", score))
    if not asked and served.offers(pb.FEATURE_STREAM):
        raise NotApplicable("the policy offers every feature")
    for field, method, request in asked:
        found = await served.session.refused(
            method, request, "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", "field", "feature"
        )
        demand(found.metadata["field"] == field, f"metadata `field` is {field!r}", found, request)
    if not served.offers(pb.FEATURE_STREAM):
        stream = pb.StreamGenerateRequest(request=served.request())
        answer = await served.session.stream("StreamGenerate", stream)
        as_demanded(answer, stream, "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", "field", "feature")


BAD_SAMPLING: tuple[tuple[str, dict[str, Any]], ...] = (
    ("temperature", {"temperature": -1.0}),
    ("temperature", {"temperature": 1e-9}),
    ("temperature", {"temperature": 101.0}),
    ("temperature", {"temperature": float("nan")}),
    ("top_p", {"top_p": 0.0}),
    ("top_p", {"top_p": 1.5}),
    ("top_k", {"top_k": -1}),
    ("max_tokens", {"max_tokens": 0}),
    ("stop", {"stop": [""]}),
    ("stop", {"stop": ["x"] * 17}),
)


@suite.check("Generate", "a bad field is INVALID_ARGUMENT INVALID_FIELD and named")
async def bad_fields(served: Served) -> None:
    for field, sampling in BAD_SAMPLING:
        await served.session.bad_field("Generate", served.request(**sampling), f"sampling.{field}")
    for count in (-1, 257):
        request = served.request()
        request.n = count
        await served.session.bad_field("Generate", request, "n")
    request = served.request()
    request.version_wait.seconds = -1
    await served.session.bad_field("Generate", request, "version_wait")


@suite.check("Generate", "without a prompt, or with an empty one, a call is INVALID_ARGUMENT")
async def empty_prompts(served: Served) -> None:
    name = served.policy.name
    await served.session.refused("Generate", pb.GenerateRequest(policy=name), "INVALID_ARGUMENT", "INVALID_FIELD")
    empty = [("Generate", pb.GenerateRequest(policy=name, messages=pb.Messages()))]
    if served.offers(TOKEN_IDS):
        empty.append(("Generate", pb.GenerateRequest(policy=name, token_ids=pb.TokenIds())))
    if served.offers(TOKEN_IDS) and not served.policy.rewrites_history:
        nothing_said = pb.Continuation(token_ids=served.ids())
        empty.append(("Generate", pb.GenerateRequest(policy=name, continuation=nothing_said)))
        nothing_held = pb.Continuation(messages=[user("A")])
        empty.append(("Generate", pb.GenerateRequest(policy=name, continuation=nothing_held)))
    for method, request in empty:
        await served.session.refused(method, request, "INVALID_ARGUMENT", "EMPTY_PROMPT", "field")


@suite.check(
    "Generate", "a token id outside the vocabulary is INVALID_ARGUMENT TOKEN_OUT_OF_VOCABULARY, with its place"
)
async def vocabulary(served: Served) -> None:
    served.need(TOKEN_IDS)
    size = served.policy.vocabulary_size
    if not size:
        raise NotApplicable("the policy does not tell its vocabulary_size")
    for bad in (-1, size, 2**31 - 1):
        request = served.request([*served.ids(2), bad])
        found = await served.session.refused(
            "Generate", request, "INVALID_ARGUMENT", "TOKEN_OUT_OF_VOCABULARY", "field", "index"
        )
        demand(found.metadata["index"] == "2", "metadata `index` is 2, its place", found, request)
        named = found.metadata["field"].split(".")[0] in ("token_ids", "prompt")
        demand(named, "metadata `field` is token_ids, or the prompt that they are", found, request)


@suite.check("Generate", "a prompt that leaves no room is INVALID_ARGUMENT PROMPT_TOO_LONG, with its length")
async def too_long(served: Served) -> None:
    served.need(TOKEN_IDS)
    length = served.policy.context_length
    if not 0 < length <= LONGEST:
        raise NotApplicable(f"the context of {length} tokens is not known, or too long to fill")
    request = served.request([served.ids(1)[0]] * length)
    found = await served.session.refused(
        "Generate", request, "INVALID_ARGUMENT", "PROMPT_TOO_LONG", "field", "token_count", "context_length"
    )
    lengths = (found.metadata["token_count"], found.metadata["context_length"])
    demand(lengths == (str(length), str(length)), f"token_count and context_length are {length}", found, request)


@suite.check("Generate", "a version that does not serve yet is FAILED_PRECONDITION POLICY_VERSION_TOO_OLD")
async def versions(served: Served) -> None:
    version = served.policy.policy_version
    request = served.request()
    request.min_policy_version = version
    await served.generate(request)
    request.min_policy_version = version + 1_000_000
    for milliseconds in (0, 50):
        if milliseconds:
            request.version_wait.FromMilliseconds(milliseconds)
        found = await served.session.refused(
            "Generate", request, "FAILED_PRECONDITION", "POLICY_VERSION_TOO_OLD", "policy_version"
        )
        named = found.metadata["policy_version"].isdecimal() and int(found.metadata["policy_version"]) >= version
        demand(named, f"metadata `policy_version` is {version}, which serves", found, request)


@suite.check("Generate", "an unknown adapter is NOT_FOUND UNKNOWN_ADAPTER, and named")
async def adapters(served: Served) -> None:
    request = served.request()
    request.adapter = "no-such-adapter"
    found = await served.session.refused("Generate", request, "NOT_FOUND", "UNKNOWN_ADAPTER", "adapter")
    demand(found.metadata["adapter"] == "no-such-adapter", "metadata `adapter` is the one that was asked for", found)


@suite.check("Score", "nothing to score, an empty sequence, a foreign token, a temperature of 0 are refused and named")
async def bad_scores(served: Served) -> None:
    served.need(SCORE, TOKEN_IDS)
    name = served.policy.name
    ids = served.ids()
    size = served.policy.vocabulary_size
    await served.session.bad_field("Score", pb.ScoreRequest(policy=name), "sequences")
    good = pb.TokenIds(ids=ids)
    zero = pb.ScoreRequest(policy=name, sequences=[good], temperature=0.0)
    await served.session.bad_field("Score", zero, "temperature")
    empty = pb.ScoreRequest(policy=name, sequences=[good, pb.TokenIds()])
    await served.session.refused("Score", empty, "INVALID_ARGUMENT", "EMPTY_PROMPT", "field")
    if size:
        foreign = pb.ScoreRequest(policy=name, sequences=[good, pb.TokenIds(ids=[*ids, size])])
        found = await served.session.refused(
            "Score", foreign, "INVALID_ARGUMENT", "TOKEN_OUT_OF_VOCABULARY", "field", "index"
        )
        demand(found.metadata["index"] == str(len(ids)), f"metadata `index` is {len(ids)}, its place", found, foreign)
    later = pb.ScoreRequest(policy=name, sequences=[good], min_policy_version=2**40)
    await served.session.refused("Score", later, "FAILED_PRECONDITION", "POLICY_VERSION_TOO_OLD", "policy_version")
