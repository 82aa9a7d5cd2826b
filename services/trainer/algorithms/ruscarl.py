"""Rubric-scaffolded reinforcement learning (RuscaRL), as fading hints: arXiv 2508.16949.

    ρ_i = (n − 1 − i)/(n − 1) · 1/(1 + e^{κ(u − u₀)}),  u = (t − 1)/(N − 1)     member i of n, step t of N
    h_i = round(ρ_i · |H|) hints, drawn from the list H
    y_i ~ π(·|x, h_i) → r_i
    A = GRPO over all members, with and without hints
    L = PPO(A_i, π/π_old(y_i|x))               the hints are taken away; π_old is the learner's own, under x

The first member sees all hints, the last one none, and after a share u₀ of the steps nobody sees any. So good samples
are found early that the policy would not find alone, and they are learnt as its own.

Published: n 8, batch 64, temperature 0.7, u₀ 0.2, κ 125, KL coefficient 1e-3, ratios clipped at 0.8 and 1.28.
Reported: from 23.6 to 50.3 on HealthBench-500, Qwen2.5-7B-Instruct.

Deviations:
1. Hints are those of the setting, or the lines of the memory's entries. In the paper they are criteria of the
   task's rubric, by which a judge also gives the reward; here the environment gives it.
2. The memory is written by nobody in this algorithm: `memory_scope` names one that another run has filled.
3. With a single member ρ is 1/(1 + e^{κ(u − u₀)}); the paper's code gives 1. A run of one step has u = 0.
4. Attempts that end in an infrastructure error are left out of the group.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from mulligan.common.plugins import located
from mulligan.trainer.aggregation import aggregate
from mulligan.trainer.algorithms import CUT_TEXTS, READING, Played
from mulligan.trainer.batch import Group, advantages, number_trained, policy_gradient, transfer
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.memory_settings import MemoryReaders
from mulligan.trainer.settings import AlgorithmSettings
from mulligan.trainer.texts import fill

FIRST = "first"
HINTED = "hinted"
TRANSFERRED = "transferred"


class Settings(AlgorithmSettings):
    name: str = "ruscarl"
    # H, one hint each; without any, H is the lines of the `memory_entries` that are shown.
    hints: tuple[str, ...] = ()
    # What attempts are told are hints, so they read nothing besides.
    memory_readers: Literal[MemoryReaders.REFLECTOR] = MemoryReaders.REFLECTOR
    # The system prompt with hints: {hints}, one a line; {solver} and {reminder} are the environment's.
    hint_prompt: str = "{solver}\n\nHints:\n{hints}"
    # u₀, the share of the steps after which half of the hints are left, and κ > 0, how suddenly they fade.
    fade_at: float = Field(0.2, ge=0, le=1)
    steepness: float = Field(125.0, gt=0)
    # Weight of all attempts, ≥ 0.
    first_weight: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _there_are_hints(self) -> Self:
        if not self.hints and not self.memory_entries:
            raise located({("hints",): "expected at least one, or memory_entries of at least 1, whose lines they are"})
        return self

    @property
    def without_effect(self) -> frozenset[str]:
        return CUT_TEXTS | (READING if self.hints else frozenset())


PLAYS = Played(1, copies=1, unsampled=1)
REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    hints = drawn(member)
    if not hints:
        await member.attempt(FIRST)
        return
    prompts = member.prompts
    told = {"hints": "\n".join(hints), "solver": prompts.solver, "reminder": prompts.action_reminder}
    hinted = await member.attempt(HINTED, system=fill(member.settings.hint_prompt, **told))
    if hinted.reward is not None:
        await member.under(TRANSFERRED, hinted)


def drawn(member: Member[Settings]) -> list[str]:
    """The hints that the member sees, in the order of the list."""
    settings = member.settings
    hints = list(settings.hints)
    if not hints:
        hints = [line for entry in member.memory for line in entry.text.splitlines() if line.strip()]
        member.shown = [entry.reflection_id for entry in member.memory]
    progress = member.step / (member.steps - 1) if member.steps > 1 else 0.0
    share = shown_share(member.rollout, member.sampling.rollouts_per_task, progress, settings)
    chosen = random.Random(member.seed).sample(range(len(hints)), round(share * len(hints)))
    return [hints[place] for place in sorted(chosen)]


def shown_share(rollout: int, size: int, progress: float, settings: Settings) -> float:
    """ρ of member `rollout` of `size`, both from 0, at the share `progress` of the steps."""
    in_group = (size - 1 - rollout) / (size - 1) if size > 1 else 1.0
    exponent = settings.steepness * (progress - settings.fade_at)
    return in_group / (1 + math.exp(min(exponent, 700.0)))  # exp() of more overflows


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """Branch `first`: attempts without hints. Branch `transferred`: those with hints, under the bare prompt."""
    played = [[sample for one in group for sample in one.samples if sample.reward is not None] for group in groups]
    targets = {target.source_id: target for group in groups for one in group for target in one.targets}
    bare_ones = [[sample for sample in samples if sample.role == FIRST] for samples in played]
    hinted = sum(sample.role != FIRST and sample.sample_id in targets for samples in played for sample in samples)
    weight = settings.first_weight / number_trained(bare_ones, hinted)
    bare: list[Datum] = []
    transferred: list[Datum] = []
    for samples, estimated in zip(played, advantages(played, settings), strict=True):
        for sample, advantage in zip(samples, estimated, strict=True):
            if sample.role == FIRST:
                bare += policy_gradient(sample, advantage, weight, FIRST)
            elif target := targets.get(sample.sample_id):
                transferred += transfer(target, sample, advantage, weight, TRANSFERRED, ratio=True)
    return aggregate(bare + transferred, settings.aggregation, settings.aggregation_constant)
