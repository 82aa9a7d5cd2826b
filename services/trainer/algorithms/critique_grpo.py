"""Critique-GRPO: arXiv 2506.03106.

    y_1 … y_n  ~ π(·|x) → r_i              attempts
    c_i        ~ judge(·|x, y_i, f_i, r_i) a critique of each
    y'_i       ~ π(·|x, y_i, c_i) → r'_i   its refinement
    y' = the best refinement of the group
    A = r − mean(r_1 … r_n, r')            one group of n + 1, without the standard deviation
    L = 1/(n + 1) · (Σ −A_i · π/π_old(y_i|x)  +  Σ −A' · p/(p + γ)),  p = π(token of y'|x), γ = 0.1

The refinement is trained under the bare prompt. Its shaping p/(p + γ) gives most to tokens that are unlikely there.

Published: 7 attempts and 1 refinement, batch 128, learning rate 1e-6, temperature 1, neither KL nor clipping nor a mean
over tokens. Reported: up to 4.4 points above GRPO on Qwen2.5-7B, in the mean of eight benchmarks.

Deviations:
1. The critique is the answer to the environment's reflection prompt, with an empty memory. It is written by
   `policies.judge`, else by the trained policy itself (the paper's self-critique), and never trained.
2. Attempts are clipped as `[loss]` says; a very large `clip_high` and `clip_low` near 1 turn it off.
3. Of equally good refinements the first one is taken. A critique that was cut at its limit is used as it is.
4. Samples that end in an infrastructure error are left out of the group.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from mulligan.common.experience import Sample, TrainingTarget
from mulligan.trainer.aggregation import aggregate
from mulligan.trainer.algorithms import CUT_TEXTS, READING, Played
from mulligan.trainer.batch import (
    Group,
    advantages,
    number_trained,
    policy_gradient,
    rewards_before,
    transfer,
    with_reward,
)
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.settings import AlgorithmSettings
from mulligan.trainer.texts import fill, guided_by, reflection_request, trace_of

FIRST = "first"
CRITIQUE = "critique"
REFINEMENT = "refinement"
TRANSFERRED = "transferred"


class Settings(AlgorithmSettings):
    name: str = "critique_grpo"
    normalize_by_std: bool = False
    # γ ≥ 0 of the shaping; 0: log p in its place.
    shape: float = Field(0.1, ge=0)
    # Whether attempts that solved the task are criticised and refined, too.
    refine_successes: bool = True
    # Whether the refinement sees the attempt beside its critique, in the environment's `retry` prompt.
    show_attempt: bool = True
    # Weights of the branches, ≥ 0.
    first_weight: float = Field(1.0, ge=0)
    refinement_weight: float = Field(1.0, ge=0)

    @property
    def without_effect(self) -> frozenset[str]:
        return CUT_TEXTS | READING


PLAYS = Played(2, texts=1, copies=1)
REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    settings, prompts = member.settings, member.prompts
    first = await member.attempt(FIRST)
    if first.reward is None or (member.solves(first) and not settings.refine_successes):
        return
    request = reflection_request(first, prompts, ())
    critique = await member.write(CRITIQUE, request, system=prompts.reflection_system, parent=first, speaker="judge")
    if not critique.outcome.has_reward:
        return
    system = guided_by(critique.text, prompts)
    if settings.show_attempt:
        system = fill(prompts.retry, trace=trace_of(first, prompts), feedback=critique.text)
    refinement = await member.attempt(REFINEMENT, system=system, parent=critique)
    if refinement.reward is not None:
        await member.under(TRANSFERRED, refinement, like=first)


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """Branch `first`: the attempts. Branch `refinement`: the best refinement of each group under the bare prompt."""
    firsts = with_reward(groups, FIRST)
    best = [best_refinement(group) for group in groups]
    mixed = [[*first, found[0]] if found else first for first, found in zip(firsts, best, strict=True)]
    count = number_trained(firsts, sum(found is not None for found in best))
    attempts: list[Datum] = []
    refinements: list[Datum] = []
    for samples, found, estimated in zip(mixed, best, advantages(mixed, settings, rewards_before(groups)), strict=True):
        for sample, advantage in zip(samples, estimated, strict=True):
            if sample.role == FIRST:
                attempts += policy_gradient(sample, advantage, settings.first_weight / count, FIRST)
            elif found:
                weight = settings.refinement_weight / count
                refinements += transfer(found[1], sample, advantage, weight, REFINEMENT, shape=settings.shape)
    return aggregate(attempts + refinements, settings.aggregation, settings.aggregation_constant)


def best_refinement(group: Group) -> tuple[Sample, TrainingTarget] | None:
    """The refinement with the largest reward that can be trained on, and its tokens under the bare prompt."""
    found = [(one.source(target), target) for one in group if (target := one.target(TRANSFERRED))]
    return max(found, key=lambda pair: pair[0].reward or 0.0, default=None)
