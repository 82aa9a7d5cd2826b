"""Checks of the strategies that see also what had no success: by words, by meaning, by exploration and mixed."""

from __future__ import annotations

from typing import Any

from mulligan.conformance.memory.scope import (
    BEST_UPLIFT,
    EXPLORE,
    MIX,
    SIMILAR_MEANING,
    SIMILAR_WORDS,
    Scope,
    with_evidence,
)
from mulligan.conformance.report import NotApplicable, Suite, Violation, demand
from mulligan.conformance.target import CheckSession, Refusal
from mulligan.memory.v1 import memory_service_pb2 as pb

suite: Suite[CheckSession] = Suite()
_TEXTS = ("Dogs sleep near the fire.", "Count the coins before you pay.", "Walk around every hole in the ice.")


async def _written(session: CheckSession) -> Scope:
    scope = await with_evidence(session)
    for number, text in enumerate(_TEXTS):
        success = number == 0
        await scope.add(f"{number}", text, reward_after=float(success), success=success)
    return scope


@suite.check("QueryReflections", "BEST_UPLIFT and EXPLORE begin with the latest where nothing was tried")
async def untried(session: CheckSession) -> None:
    scope = await _written(session)
    await scope.add("elsewhere", environment="maze")
    for strategy in (BEST_UPLIFT, EXPLORE):
        await scope.finds("all of the environment, the latest first", [*reversed(_TEXTS)], 9, strategy)
        await scope.finds("the latest", [_TEXTS[2]], 1, strategy)
        await scope.finds("what was there at version 1", [_TEXTS[0]], 9, strategy, as_of_version=1)


@suite.check("QueryReflections", "BEST_UPLIFT begins with what was written last, also where the text was known")
async def repeated(session: CheckSession) -> None:
    scope = await _written(session)
    again = scope.request("again", _TEXTS[0])
    again.unless_known = True
    await scope.send(again)
    await scope.finds("the entry that was known", [_TEXTS[0]], 1, BEST_UPLIFT)
    await scope.finds("the order of version 3", [*reversed(_TEXTS)], 9, BEST_UPLIFT, as_of_version=3)
    await scope.finds("the latest entry", [_TEXTS[2]], 1, EXPLORE)


@suite.check("QueryReflections", "SIMILAR_WORDS finds the entries that share words, those that share rare ones first")
async def words(session: CheckSession) -> None:
    scope = await _written(session)
    await scope.finds("the entry with the word", [_TEXTS[1]], 9, SIMILAR_WORDS, text="COINS?")
    await scope.finds("nothing without a common word", [], 9, SIMILAR_WORDS, text="quartz")
    found = await scope.found(9, SIMILAR_WORDS, text="the hole")
    demand(found[:1] == [_TEXTS[2]] and sorted(found) == sorted(_TEXTS), "all, the one with `hole` first", found)
    await scope.finds("nothing of a later version", [], 9, SIMILAR_WORDS, text="hole", as_of_version=2)
    for text in ('"', "' OR 1=1 --", "NOT(q w)", "* AND (", "\x00", "-", "🧊"):  # no language of queries
        await scope.finds("nothing without a common word", [], 9, SIMILAR_WORDS, text=text)
    await session.bad_field("QueryReflections", scope.query(9, SIMILAR_WORDS), "text")


@suite.check("QueryReflections", "SIMILAR_MEANING finds a text by itself, or is FAILED_PRECONDITION NO_EMBEDDER")
async def meaning(session: CheckSession) -> None:
    scope = await _written(session)
    for text in _TEXTS:
        request = scope.query(1, SIMILAR_MEANING, text=text)
        answer = await session.attempt("QueryReflections", request)
        if isinstance(answer, Refusal):
            if (answer.code, answer.reason) == ("FAILED_PRECONDITION", "NO_EMBEDDER"):
                raise NotApplicable("the server has no embedder")
            raise Violation("this call is answered, or FAILED_PRECONDITION NO_EMBEDDER", answer, request)
        demand([one.text for one in answer.reflections] == [text], f"the entry with this text: {text}", answer, request)
    await session.bad_field("QueryReflections", scope.query(1, SIMILAR_MEANING), "text")
    await scope.finds("nothing of a later version", [_TEXTS[0]], 9, SIMILAR_MEANING, text=_TEXTS[2], as_of_version=1)
    numbers = [1.0] * 8192 + [float("nan")]
    for bad in (numbers, numbers[8191:]):
        await session.bad_field("QueryReflections", scope.query(1, SIMILAR_MEANING, embedding=bad), "embedding")


@suite.check("QueryReflections", "MIX finds some of each strategy, in its order, without near-duplicates")
async def mixed(session: CheckSession) -> None:
    scope = await _written(session)
    await scope.add("repeated", _TEXTS[1].upper())
    parts = [pb.MixPart(strategy=SIMILAR_WORDS, limit=1), pb.MixPart(strategy=EXPLORE, limit=2)]
    expected = [_TEXTS[0], _TEXTS[1].upper(), _TEXTS[2]]
    await scope.finds("one by words, then two to explore", expected, 9, MIX, mix=parts, text="dogs")
    await scope.finds("the first two of them", expected[:2], 2, MIX, mix=parts, text="dogs")
    parts = [pb.MixPart(strategy=SIMILAR_WORDS, limit=2), pb.MixPart(strategy=EXPLORE, limit=2)]
    found = await scope.found(9, MIX, mix=parts, text="coins pay")
    once = len([text for text in found if text.lower() == _TEXTS[1].lower()])
    demand(once == 1, "one of two entries with the same words", found, scope.query(9, MIX, mix=parts, text="coins pay"))
    both = [pb.MixPart(strategy=strategy, limit=1) for strategy in (BEST_UPLIFT, EXPLORE)]
    await scope.finds("the latest, then another one", [_TEXTS[1].upper(), _TEXTS[2]], 9, MIX, mix=both)
    for text in ("Left is safe, right is a hole.", "Right is safe, left is a hole."):
        await scope.add(text)
    opposite = ["Right is safe, left is a hole.", "Left is safe, right is a hole."]
    await scope.finds("texts that have the same words and say the opposite", opposite, 9, MIX, mix=both)


@suite.check("QueryReflections", "what a strategy needs and lacks, or does not take, is INVALID_ARGUMENT INVALID_FIELD")
async def bad_fields(session: CheckSession) -> None:
    scope = await with_evidence(session)
    part = pb.MixPart(strategy=EXPLORE, limit=1)
    cases: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("mix", MIX, {}),
        ("mix", EXPLORE, {"mix": [part]}),
        ("mix", MIX, {"mix": [part] * 9}),
        ("mix", MIX, {"mix": [pb.MixPart(strategy=MIX, limit=1)]}),
        ("mix", MIX, {"mix": [pb.MixPart(strategy=EXPLORE)]}),
        ("text", MIX, {"mix": [pb.MixPart(strategy=SIMILAR_WORDS, limit=1)]}),
        ("text", SIMILAR_WORDS, {"text": "x" * (2**20 + 1)}),
        ("kinds", EXPLORE, {"kinds": [0]}),
        ("max_tokens", EXPLORE, {"max_tokens": -1}),
        ("task_prefix", EXPLORE, {"task_prefix": "t" * 201}),
    )
    for field, strategy, change in cases:
        await session.bad_field("QueryReflections", scope.query(1, strategy, **change), field)
