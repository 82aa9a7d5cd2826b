"""Tree search for preference pairs, after SPaR: arXiv 2412.11605.

    y ~ π(·|x) → r;  r ≥ τ: done
    level = {y}
    for d = 1 … depth:
        for each y of the level: t, one of its turns
            y_1 … y_b ~ π(·| y up to turn t)          branches: forks of the episode
        level = the `keep` best of all branches;  one of them solves the task: done
    at each turn t: the best branch ≻ the worst of the other branches and of y's own rest
    L = −log σ(β (log π/π_ref(y⁺) − log π/π_ref(y⁻))) − φ · mean log π(y⁺)     from turn t on, up to there both are one

The two of a pair differ from turn t on alone, as SPaR's refinements differ from what they refine in what matters alone.

Published: 3 branches, 2 kept, depth 3; β 0.1, φ 0.1, learning rate 2e-7, one epoch. Reported: LLaMA-3-8B above
GPT-4-Turbo on IFEval after three iterations.

Deviations:
1. SPaR's branches are new answers by a refiner that saw a critique; here the policy plays on from a state on the way.
2. `score` "reward" selects by the environment's reward; "judge" by the number that `policies.judge`, else the policy
   itself, gives to the trace. SPaR's judge is the refiner, which is trained as well; here it is not.
3. The turn t is drawn evenly from those of the episode, or is the last one with `fork_turn = "last"`.
4. The reference is that of `[loss]`, as in `dpo_pairs`. The environment's tokens count in neither answer.
5. Branches that end in an infrastructure error, or without a score, are left out. A verdict that was cut at its token
   limit (`rollout.reflection_max_tokens`) gives no score, as the number is to stand at its end; it is counted as
   `dropped_cut_verdict`.
6. π and π_ref are at the temperature of the sampling (`rollout.temperature`). Published: 1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from math import isfinite

from pydantic import Field

from mulligan.common.experience import Experience, ForkPoint, Sample
from mulligan.common.rewards import exceeds, reaches, total
from mulligan.common.types import Outcome
from mulligan.trainer.algorithms import ADVANTAGES, AGGREGATION, CUT_TEXTS, POLICY_GRADIENT, READING
from mulligan.trainer.batch import Group, preferences, rest_of
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.settings import AlgorithmSettings
from mulligan.trainer.texts import fill, trace_of
from mulligan.trainer.trainable import CUT_VERDICT

NEEDS = {"fork", "tokenize"}
FIRST = "first"
BRANCH = "branch"
VERDICT = "verdict"
PAIRS = "pairs"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class ScoredBy(StrEnum):
    REWARD = "reward"
    JUDGE = "judge"


class ForkTurn(StrEnum):
    ANY = "any"
    LAST = "last"


class Settings(AlgorithmSettings):
    name: str = "spar"
    # Levels of the tree, branches of each episode, and episodes that are kept of a level; at least 1 each.
    depth: int = Field(3, ge=1, le=100)
    branches: int = Field(3, ge=1, le=100)
    keep: int = Field(2, ge=1, le=100)
    # Where branches begin: "any" turn of the episode, or its "last".
    fork_turn: ForkTurn = ForkTurn.ANY
    # What selects: "reward" or "judge".
    score: ScoredBy = ScoredBy.REWARD
    # The judge's prompt: {trace} and {feedback} are those of the episode. The last number in the answer is the score.
    judge_prompt: str = "{trace}\n{feedback}\n\nHow good is this attempt, from 0 to 10? End with the number."
    # β > 0 and φ ≥ 0.
    beta: float = Field(0.1, gt=0)
    ftx: float = Field(0.1, ge=0)
    # Weight of the mean over the pairs, ≥ 0.
    pair_weight: float = Field(1.0, ge=0)

    @property
    def without_effect(self) -> frozenset[str]:
        return ADVANTAGES | AGGREGATION | POLICY_GRADIENT | CUT_TEXTS | READING


REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    settings = member.settings
    first = await member.attempt(FIRST)
    if first.reward is None or member.solves(first):
        return
    if settings.score is ScoredBy.JUDGE:
        await _judged(member, first)
    level = [first]
    for _ in range(settings.depth):
        grown: list[tuple[float, Sample]] = []
        for episode in level:
            turn = fork_turn(member, episode)
            for _ in range(settings.branches):
                branch = await member.fork(BRANCH, episode, turn)
                score = await _score(member, branch)
                if score is not None:
                    grown.append((score, branch))
        grown.sort(key=lambda pair: -pair[0])  # stable: of equals, the first
        level = [branch for _, branch in grown[: settings.keep]]
        if any(reaches(_whole_reward(member, branch), settings.success_threshold) for branch in level):
            return


def fork_turn(member: Member[Settings], episode: Sample) -> int:
    """The turn at which branches begin, counted from the start of the task; one of the episode's own."""
    count = len(episode.turns)
    before = len(member.turns_of(episode)) - count
    if member.settings.fork_turn is ForkTurn.LAST:
        return before + count - 1
    return before + derive_seed(member.seed, "turn", len(member.samples)) % count


async def _score(member: Member[Settings], branch: Sample) -> float | None:
    """By what a branch is selected: over all its path, so that those of different episodes compare."""
    if branch.reward is None:
        return None
    if member.settings.score is ScoredBy.JUDGE:
        return (await _judged(member, branch)).reward
    return _whole_reward(member, branch)


def _whole_reward(member: Member[Settings], branch: Sample) -> float:
    return total(turn.reward for turn in member.turns_of(branch))


async def _judged(member: Member[Settings], episode: Sample) -> Sample:
    """The judge's verdict on an episode. The score is its reward; a verdict that was cut gives none."""
    trace = trace_of(replace(episode, turns=member.turns_of(episode)), member.prompts)
    request = fill(member.settings.judge_prompt, trace=trace, feedback=episode.feedback)
    verdict = await member.write(VERDICT, request, parent=episode, speaker="judge")
    if verdict.outcome is Outcome.TRUNCATED:
        member.untrained.append(CUT_VERDICT)
        return verdict
    return member.credit(verdict, score_in(verdict.text))


def score_in(answer: str) -> float | None:
    """The last number in a judge's answer."""
    found = [float(number) for number in _NUMBER.findall(answer)]
    return found[-1] if found and isfinite(found[-1]) else None


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """One branch, `pairs`."""
    pairs = [pair for group in groups for one in group for pair in pairs_of(one, settings)]
    return preferences(pairs, settings.beta, settings.ftx, settings.pair_weight, PAIRS)


def pairs_of(experience: Experience, settings: Settings) -> Iterator[tuple[Sample, Sample]]:
    """The best branch of each fork, and the worst of the others and of the episode's own rest, if that is worse."""
    points: dict[ForkPoint, list[Sample]] = defaultdict(list)
    for sample in experience.samples:
        if sample.forked_from is not None:
            points[sample.forked_from].append(sample)
    verdicts = {one.parent_id: one.reward for one in experience.samples if one.role == VERDICT}
    for point, branches in points.items():
        source = next(one for one in experience.samples if one.episode_id == point.episode_id)
        scored = []
        for one in [*branches, rest_of(source, point.step_index)]:
            score = verdicts.get(one.sample_id) if settings.score is ScoredBy.JUDGE else one.reward
            if one.reward is not None and score is not None and len(one.sequences) == 1:
                scored.append((score, one))
        best = max((pair for pair in scored if pair[1] in branches), key=lambda pair: pair[0], default=None)
        worst = min(scored, key=lambda pair: pair[0], default=None)
        if best and worst and exceeds(best[0], worst[0]):
            yield best[1], worst[1]
