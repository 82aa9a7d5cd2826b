"""Checks of Score and Tokenize, also against Generate."""

from __future__ import annotations

from typing import Any

from mulligan.conformance.policy.served import LOG_PROBS, SCORE, TOKEN_IDS, Served, difference, user
from mulligan.conformance.report import Suite, demand
from mulligan.policy.v1 import policy_service_pb2 as pb

suite: Suite[Served] = Suite()


async def scored(served: Served, *sequences: list[int], **options: Any) -> pb.ScoreResponse:
    served.need(SCORE, TOKEN_IDS)
    request = pb.ScoreRequest(
        policy=served.policy.name, sequences=[pb.TokenIds(ids=sequence) for sequence in sequences], **options
    )
    answer: pb.ScoreResponse = await served.session.ask("Score", request)
    demand(len(answer.scores) == len(sequences), f"{len(sequences)} rows of scores", answer, request)
    for sequence, row in zip(sequences, answer.scores, strict=True):
        served.log_probs(row.log_probs, len(sequence) - 1, request)
    return answer


@suite.check("Score", "each sequence has a log-probability per token after the first, in the order of the request")
async def shapes(served: Served) -> None:
    ids = served.ids(12)
    several = await scored(served, ids[:6], ids[:1], ids, ids[3:7])
    for sequence, row in zip((ids[:6], ids[:1], ids, ids[3:7]), several.scores, strict=True):
        alone = (await scored(served, sequence)).scores[0]
        served.close(row.log_probs, alone.log_probs, "the scores that the sequence has alone", f"{sequence}")
    prefix = several.scores[2].log_probs[:5]
    served.close(prefix, several.scores[0].log_probs, "the scores of a prefix at the start of the whole", f"{ids}")
    version = served.policy.policy_version
    demand(several.policy_version >= version, f"policy_version {version}, which serves", several)


@suite.check("Score", "Score and Generate agree on the log-probabilities of what was sampled")
async def agreement(served: Served) -> None:
    served.need(SCORE, TOKEN_IDS, LOG_PROBS)
    prompt = served.ids()
    request = served.request(prompt, temperature=1.0, max_tokens=12)
    sampled = (await served.generate(request)).completions[0]
    row = (await scored(served, [*prompt, *sampled.token_ids])).scores[0].log_probs[len(prompt) - 1 :]
    served.close(sampled.log_probs, row, "the same log-probabilities from Generate and Score", request)


@suite.check("Score", "log-probabilities are of softmax(logits / temperature)")
async def temperature(served: Served) -> None:
    served.need(SCORE, TOKEN_IDS, LOG_PROBS, pb.FEATURE_SCORE_TEMPERATURE)
    prompt = served.ids()
    request = served.request(prompt, temperature=2.0, max_tokens=12)
    sampled = (await served.generate(request)).completions[0]
    row = (await scored(served, [*prompt, *sampled.token_ids], temperature=2.0)).scores[0].log_probs[len(prompt) - 1 :]
    served.close(sampled.log_probs, row, "the same log-probabilities at temperature 2", request)


@suite.check("Tokenize", "messages become the tokens of Generate's prompt, the same each time")
async def messages(served: Served) -> None:
    served.need(TOKEN_IDS)
    said = pb.Messages(messages=[user("Say something.")])
    request = pb.TokenizeRequest(policy=served.policy.name, messages=said)
    found, again = [list((await served.session.ask("Tokenize", request)).token_ids) for _ in range(2)]
    demand(found == again, "the same ids again", difference(again, found), request)
    prompt = list((await served.generate(served.request())).prompt_token_ids)
    demand(found == prompt, "the ids of Generate's prompt", difference(found, prompt), request)


@suite.check("Tokenize", "text becomes token ids of the vocabulary; no text becomes none")
async def text(served: Served) -> None:
    served.need(TOKEN_IDS)
    for given in ("A plain sentence.", "é🧊√", "{}[]<>\n"):
        request = pb.TokenizeRequest(policy=served.policy.name, text=given)
        ids = (await served.session.ask("Tokenize", request)).token_ids
        demand(len(ids) > 0, "token ids", "none", request)
        served.vocabulary("token ids", ids, request)
    nothing = (await served.session.ask("Tokenize", pb.TokenizeRequest(policy=served.policy.name, text=""))).token_ids
    demand(not nothing, "no ids for an empty text", list(nothing))
