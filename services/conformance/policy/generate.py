"""Checks of a policy's description and of its samples."""

from __future__ import annotations

import json
import re

from mulligan.conformance.policy.served import LOG_PROBS, TOKEN_IDS, Served, difference, user
from mulligan.conformance.report import NotApplicable, Suite, demand
from mulligan.policy.v1 import policy_service_pb2 as pb

suite: Suite[Served] = Suite()
_LETTERS = "[ab]{3}"
_ANSWERS = ["yes", "no"]


@suite.check("GetPolicy", "a policy's numbers, features and state are valid")
async def describes_itself(served: Served) -> None:
    policy = served.policy
    features = [pb.Feature.Name(feature) for feature in policy.features]
    demand(len(set(features)) == len(features), "each feature once", features)
    demand(pb.FEATURE_UNSPECIFIED not in policy.features, "no FEATURE_UNSPECIFIED", features)
    demand(policy.state == pb.POLICY_STATE_SERVING, "POLICY_STATE_SERVING, as it is to be checked", policy)
    numbers = (policy.policy_version, policy.context_length, policy.vocabulary_size, policy.draining_models)
    demand(min(numbers) >= 0, "numbers that are not negative", policy)
    if served.offers(TOKEN_IDS):
        demand(bool(policy.fingerprint), "a fingerprint, with FEATURE_TOKEN_IDS", policy)
        served.vocabulary("end_of_turn_token_ids", policy.end_of_turn_token_ids, "")
    if served.offers(LOG_PROBS):
        demand(served.offers(TOKEN_IDS), "FEATURE_TOKEN_IDS beside FEATURE_LOG_PROBS", features)


@suite.check("Generate", "messages are answered with a sample, its log-probabilities, versions and stop reason")
async def messages(served: Served) -> None:
    request = served.request()
    answer = await served.generate(request)
    if served.offers(TOKEN_IDS):
        demand(len(answer.prompt_token_ids) > 0, "the whole rendered prompt in prompt_token_ids", answer, request)
        served.vocabulary("prompt_token_ids", answer.prompt_token_ids, request)


@suite.check("Generate", "token ids are used as they are")
async def token_ids(served: Served) -> None:
    served.need(TOKEN_IDS)
    request = served.request(served.ids())
    answer = await served.generate(request)
    demand(not answer.prompt_token_ids, "nothing in prompt_token_ids for a prompt of token ids", answer, request)


@suite.check("Generate", "n samples are n completions; more than one needs a temperature above 0")
async def samples(served: Served) -> None:
    request = served.request(temperature=1.0)
    for count in (2, 4):
        request.n = count
        await served.generate(request)
    request.sampling.temperature = 0.0
    await served.session.bad_field("Generate", request, "n")


@suite.check("Generate", "it stops after max_tokens")
async def max_tokens(served: Served) -> None:
    whole = (await served.generate(served.request(temperature=0.0, max_tokens=8))).completions[0]
    one = (await served.generate(served.request(temperature=0.0, max_tokens=1))).completions[0]
    short = served.offers(TOKEN_IDS) and len(whole.token_ids) > 1
    cut = one.stop_reason == pb.STOP_REASON_MAX_TOKENS
    demand(cut or not short, "STOP_REASON_MAX_TOKENS after one token of several", one)


@suite.check("Generate", "it stops with the token that completes a stop string, which is included")
async def stop_string(served: Served) -> None:
    whole = (await served.generate(served.request(temperature=0.0, max_tokens=32))).completions[0]
    letters = [character for character in whole.text[1:-1] if character.isalnum()]
    if not letters:
        raise NotApplicable("the policy says nothing that could be stopped")
    request = served.request(temperature=0.0, max_tokens=32, stop=["\u2603 never this", letters[0]])
    stopped = (await served.generate(request)).completions[0]
    demand(stopped.stop_reason == pb.STOP_REASON_STOP_STRING, "STOP_REASON_STOP_STRING", stopped, request)
    demand(letters[0] in stopped.text, f"{letters[0]!r} in the text", stopped, request)


@suite.check("Generate", "it stops with any of stop_token_ids, which is the last token")
async def stop_token(served: Served) -> None:
    served.need(TOKEN_IDS, pb.FEATURE_STOP_TOKEN_IDS)
    whole = (await served.generate(served.request(temperature=0.0))).completions[0]
    token = whole.token_ids[0]
    if token in served.policy.end_of_turn_token_ids:
        raise NotApplicable("the policy closes its turn at once")
    request = served.request(temperature=0.0, stop_token_ids=[token])
    stopped = (await served.generate(request)).completions[0]
    right = stopped.stop_reason == pb.STOP_REASON_STOP_TOKEN and list(stopped.token_ids) == [token]
    demand(right, f"STOP_REASON_STOP_TOKEN after token {token}", stopped, request)


@suite.check("Generate", "the same seed gives the same sample; sample 0 of several uses the seed unchanged")
async def seed(served: Served) -> None:
    served.need(pb.FEATURE_SEED)
    request = served.request(temperature=1.0, seed=20_231)
    first = (await served.generate(request)).completions[0]
    again = (await served.generate(request)).completions[0]
    several = pb.GenerateRequest()
    several.CopyFrom(request)
    several.n = 2
    zero = (await served.generate(several)).completions[0]
    for other in (again, zero):
        same = (list(other.token_ids), other.text) == (list(first.token_ids), first.text)
        demand(same, f"the same tokens, {list(first.token_ids)}, {first.text!r}", other, request)


@suite.check("Generate", "top_k of 1 is greedy at any temperature")
async def top_k(served: Served) -> None:
    served.need(pb.FEATURE_TOP_K)
    greedy = (await served.generate(served.request(temperature=0.0, max_tokens=2))).completions[0]
    request = served.request(temperature=50.0, top_k=1, max_tokens=2)
    found = (await served.generate(request)).completions[0]
    demand(found.text == greedy.text, f"the likeliest tokens, {greedy.text!r}", found, request)


@suite.check("Generate", "a regular expression matches all of the text")
async def regex(served: Served) -> None:
    served.need(pb.FEATURE_REGEX)
    request = served.request(regex=_LETTERS, max_tokens=64)
    text = (await served.generate(request)).completions[0].text
    demand(re.fullmatch(_LETTERS, text) is not None, f"a text that {_LETTERS} matches", repr(text), request)


@suite.check("Generate", "a JSON schema holds for the text")
async def json_schema(served: Served) -> None:
    served.need(pb.FEATURE_JSON_SCHEMA)
    request = served.request(json_schema=json.dumps({"enum": _ANSWERS}), max_tokens=64)
    text = (await served.generate(request)).completions[0].text
    try:
        right = json.loads(text) in _ANSWERS
    except ValueError:
        right = False
    demand(right, f"JSON for one of {_ANSWERS}", repr(text), request)


@suite.check("Generate", "a continuation goes on from the caller's tokens, and only what is appended comes back")
async def continuation(served: Served) -> None:
    served.need(TOKEN_IDS)
    first = await served.generate(served.request())
    sampled = first.completions[0]
    more = pb.Continuation(
        token_ids=[*first.prompt_token_ids, *sampled.token_ids],
        turn_closed=sampled.stop_reason == pb.STOP_REASON_END_OF_TURN,
        messages=[user("And then?")],
    )
    request = served.request(more)
    if served.policy.rewrites_history:
        await served.session.refused("Generate", request, "FAILED_PRECONDITION", "TEMPLATE_REWRITES_HISTORY")
        return
    answer = await served.generate(request)
    appended = list(answer.prompt_token_ids)
    held = list(more.token_ids)
    repeats = appended[: len(held)] == held
    demand(bool(appended) and not repeats, "only the ids appended to the caller's", answer, request)
    asked = pb.TokenizeRequest(policy=served.policy.name, continuation=more)
    found = list((await served.session.ask("Tokenize", asked)).token_ids)
    demand(found == appended, "the same from Tokenize", difference(found, appended), asked)
