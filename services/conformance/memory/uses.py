"""Checks of trials: the uses that a query draws, their outcomes, and the evidence that follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mulligan.conformance.memory.scope import BEST_UPLIFT, BY_KEY, EXPLORE, Scope, optional, with_evidence
from mulligan.conformance.report import Suite, demand
from mulligan.conformance.target import CheckSession
from mulligan.memory.v1 import memory_service_pb2 as pb

suite: Suite[CheckSession] = Suite()
_MANY = 1000
_ERROR = 0.1  # of a share among so many: six standard deviations and more


def trial(count: int, holdout: float = 0.5, seed: int = 7, name: str = "use") -> pb.Trial:
    return pb.Trial(use_keys=[f"{name}-{number}" for number in range(count)], holdout=holdout, seed=seed)


async def _two(session: CheckSession) -> tuple[Scope, str, str]:
    """A scope with two entries, and the ids of both."""
    scope = await with_evidence(session)
    return scope, (await scope.add("first")).reflection_id, (await scope.add("second")).reflection_id


def _drawn(answer: pb.QueryReflectionsResponse) -> list[tuple[str, str, str]]:
    return [(use.use_id, use.use_key, use.left_out_id) for use in answer.uses]


@suite.check("QueryReflections", "a trial draws a use for each key, in which at most one retrieved entry is left out")
async def drawn(session: CheckSession) -> None:
    scope, *ids = await _two(session)
    asked = trial(5)
    answer = await scope.query_answer(trial=asked)
    keys = [use.use_key for use in answer.uses]
    demand(keys == list(asked.use_keys), "a use for each key, in their order", answer.uses, asked)
    demand(len({use.use_id for use in answer.uses} - {""}) == 5, "an id for each use", answer.uses, asked)
    demand({use.left_out_id for use in answer.uses} <= {"", *ids}, "left_out_id of a retrieved entry", answer.uses)
    plain = await scope.query_answer()
    demand(not plain.uses, "no uses without a trial", plain)
    nothing = await scope.query_answer(strategy=BY_KEY, key="nothing", trial=trial(3, name="other"))
    demand(not nothing.uses, "no uses of nothing", nothing)
    demand((await scope.snapshot())[0] == 2, "no version is made", f"version {(await scope.snapshot())[0]}")


@suite.check("QueryReflections", "each entry is left out with the same probability, and none with holdout 0")
async def shares(session: CheckSession) -> None:
    scope, *ids = await _two(session)
    answer = await scope.query_answer(trial=trial(_MANY))
    for identity, share in ((ids[0], 0.25), (ids[1], 0.25), ("", 0.5)):
        found = sum(use.left_out_id == identity for use in answer.uses) / _MANY
        left_out = identity or "none"
        demand(abs(found - share) < _ERROR, f"{left_out} left out in about {share:.0%} of uses", f"{found:.0%}")
    answer = await scope.query_answer(trial=trial(100, 0.0, name="all"))
    demand(not any(use.left_out_id for use in answer.uses), "none left out with holdout 0", answer.uses)


@suite.check("QueryReflections", "what a use leaves out follows from seed, key and entries")
async def repeatable(session: CheckSession) -> None:
    scope, *_ = await _two(session)
    first = await scope.query_answer(trial=trial(200))
    again = await scope.query_answer(trial=trial(200))
    demand(_drawn(again) == _drawn(first), "the same uses for the same trial", "other uses", trial(3))
    other = await scope.query_answer(trial=trial(200, seed=8, name="other"))
    same = [one.left_out_id == two.left_out_id for one, two in zip(first.uses, other.uses, strict=True)]
    demand(not all(same), "other draws for other keys and another seed", "the same draws")


@suite.check("QueryReflections", "a key that was drawn for other entries is ALREADY_EXISTS REQUEST_CONFLICT")
async def drawn_for_others(session: CheckSession) -> None:
    scope, *_ = await _two(session)
    await scope.query_answer(trial=trial(3))
    await scope.add("third")
    request = scope.query(9, EXPLORE, trial=trial(3))
    await session.refused("QueryReflections", request, "ALREADY_EXISTS", "REQUEST_CONFLICT")
    for field, bad in (
        ("trial.use_keys", pb.Trial(holdout=0.1)),
        ("trial.use_keys", pb.Trial(use_keys=["a", "a"])),
        ("trial.holdout", pb.Trial(use_keys=["a"], holdout=0.51)),
        ("trial.holdout", pb.Trial(use_keys=["a"], holdout=-0.1)),
        ("trial.holdout", pb.Trial(use_keys=["a"], holdout=float("nan"))),
    ):
        await session.bad_field("QueryReflections", scope.query(9, EXPLORE, trial=bad), field)


@suite.check("ReportOutcome", "a use counts once, and a report makes a version")
async def counted(session: CheckSession) -> None:
    scope, *_ = await _two(session)
    uses = (await scope.query_answer(trial=trial(4))).uses
    found = await scope.report([(use.use_id, 1.0) for use in uses[:3]])
    demand(found == 3, "3 uses counted", f"{found}")
    found = await scope.report([(use.use_id, 0.0) for use in uses])
    demand(found == 1, "1 use counted, as 3 had been reported", f"{found}")
    demand((await scope.snapshot())[0] == 4, "the scope at version 4", f"version {(await scope.snapshot())[0]}")
    found = await scope.report([(use.use_id, 0.0) for use in uses])
    demand(found == 0, "no use counted again", f"{found}")


@suite.check("ReportOutcome", "an unknown use is NOT_FOUND UNKNOWN_USE, which names it, and nothing is recorded")
async def unknown_use(session: CheckSession) -> None:
    scope, first, _ = await _two(session)
    use = (await scope.query_answer(trial=trial(1))).uses[0]
    await scope.explain(first)
    outcomes = [pb.UseOutcome(use_id=use.use_id, reward=1.0), pb.UseOutcome(use_id="no such use", reward=1.0)]
    request = pb.ReportOutcomeRequest(outcomes=outcomes)
    await optional(session, "ReportOutcome", pb.ReportOutcomeRequest(outcomes=[await _other_use(scope)]))
    refusal = await session.refused("ReportOutcome", request, "NOT_FOUND", "UNKNOWN_USE", "use_id")
    demand(refusal.metadata["use_id"] == "no such use", "metadata `use_id`", refusal, request)
    found = await scope.report([(use.use_id, 1.0)])
    demand(found == 1, "the known use not recorded by the refused call", f"{found} counted", request)
    for field, bad in (
        ("outcomes", []),
        ("outcomes", [pb.UseOutcome(reward=1.0)]),
        ("outcomes", [pb.UseOutcome(use_id=use.use_id, reward=1.5)]),
        ("outcomes", [pb.UseOutcome(use_id=use.use_id, reward=float("nan"))]),
    ):
        await session.bad_field("ReportOutcome", pb.ReportOutcomeRequest(outcomes=bad), field)


async def _other_use(scope: Scope) -> pb.UseOutcome:
    return pb.UseOutcome(use_id=(await scope.query_answer(trial=trial(1, name="other"))).uses[0].use_id, reward=1.0)


async def _with_outcomes(session: CheckSession) -> tuple[Scope, str, str, Sequence[Any]]:
    """Two entries, of which `second` harms: attempts succeed exactly where it is left out."""
    scope, first, second = await _two(session)
    uses = (await scope.query_answer(trial=trial(_MANY))).uses
    await scope.report([(use.use_id, float(use.left_out_id == second)) for use in uses])
    return scope, first, second, uses


@suite.check("ReportOutcome", "an entry's uplift has its uses, their mean rewards, and an interval around the estimate")
async def uplift(session: CheckSession) -> None:
    scope, _, second, _ = await _with_outcomes(session)
    stored = await scope.get(second)
    demand(stored.HasField("uplift") and stored.uplift.HasField("uplift"), "an uplift with an estimate", stored)
    found = stored.uplift
    demand(found.uses_shown > 0 and found.uses_left_out > 0, "uses of both sorts", found)
    means = (found.mean_reward_shown, found.mean_reward_left_out)
    demand(means == (0.0, 1.0), "mean reward 0 where it was shown, 1 where it was left out", found)
    demand(-1 <= found.lower <= found.uplift <= found.upper <= 1, "-1 <= lower <= uplift <= upper <= 1", found)
    demand(found.lower <= -0.9, "an interval that holds the true uplift, -1, or nearly", found)


@suite.check("ReportOutcome", "an entry that does harm is QUARANTINED: EXPLORE alone retrieves it, behind the others")
async def quarantined(session: CheckSession) -> None:
    scope, _, second, _ = await _with_outcomes(session)
    stored = await scope.get(second)
    demand(stored.status == pb.REFLECTION_STATUS_QUARANTINED, "QUARANTINED", stored)
    demand(stored.uplift.upper < 0, "an interval below 0", stored)
    await scope.finds("the other one", ["first"], 9, BEST_UPLIFT)
    await scope.finds("both, the quarantined one last", ["first", "second"], 9, EXPLORE)
    for strategy in (1, 2):
        await scope.finds("the other one", ["first"], 9, strategy)
    await scope.finds("both, as of the version before the report", ["second", "first"], 9, BEST_UPLIFT, as_of_version=2)
    before = (await scope.query_answer(strategy=BEST_UPLIFT, as_of_version=2)).reflections[0]
    candidate = before.status == pb.REFLECTION_STATUS_CANDIDATE and not before.HasField("uplift")
    demand(candidate, "a candidate without uplift, as of the version before the report", before)


@suite.check("ReviseReflection", "a new text starts without evidence, as a candidate")
async def anew(session: CheckSession) -> None:
    scope, _, second, _ = await _with_outcomes(session)
    await scope.revise(second, 1, key="k")
    stored = await scope.get(second)
    kept = stored.HasField("uplift") and stored.status == pb.REFLECTION_STATUS_QUARANTINED
    demand(kept, "evidence and status as before with another key", stored)
    await scope.revise(second, 2, text="better")
    stored = await scope.get(second)
    fresh = not stored.HasField("uplift") and stored.status == pb.REFLECTION_STATUS_CANDIDATE
    demand(fresh, "a candidate without uplift", stored)
    await scope.finds("it is retrieved again", ["better", "first"], 9, EXPLORE)


@suite.check("ExplainReflection", "it lists the latest uses first, with their rewards, and where the entry comes from")
async def explained(session: CheckSession) -> None:
    scope, first, second, uses = await _with_outcomes(session)
    child = (await scope.labelled("child", source_ids=[second])).reflection_id
    grandchild = (await scope.labelled("grandchild", source_ids=[child, first])).reflection_id
    answer = await scope.explain(second, 10)
    latest = [use.use_id for use in reversed(uses)][:10]
    demand([use.use_id for use in answer.uses] == latest, "the ten latest uses, the latest first", answer)
    for use, expected in zip(answer.uses, reversed(uses[-10:]), strict=True):
        shown = expected.left_out_id != second
        demand(use.shown == shown and use.use_key == expected.use_key, "whether it was shown in the use", use)
        demand(use.HasField("reward") and use.reward == float(not shown), "the reward that was reported", use)
        demand(abs(use.holdout - 0.25) < 1e-9 and use.revision == 1, "holdout 0.25, of revision 1", use)
    demand(len((await scope.explain(second)).uses) == 100, "100 uses, as max_uses is 0", "another number")
    demand(list(answer.derived_ids) == [child], "the id of the entry that was made from it", answer.derived_ids)
    sources = [one.text for one in (await scope.explain(grandchild)).sources]
    demand(sources == ["child", "first", "second"], "what it was made from, parents before grandparents", sources)
    unknown = pb.ExplainReflectionRequest(reflection_id="no such reflection")
    await session.refused("ExplainReflection", unknown, "NOT_FOUND", "UNKNOWN_REFLECTION")
    bad = pb.ExplainReflectionRequest(reflection_id=first, max_uses=1001)
    await session.bad_field("ExplainReflection", bad, "max_uses")
