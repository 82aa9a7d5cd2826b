"""Evaluations: what the run's events say of one is what its episodes earned, and what the infrastructure lost counts as
excluded.

An evaluation that was broken off is played again, so the event has the numbers of one of those that were begun.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean

from mulligan.common.rewards import reaches, total
from mulligan.testing.judge.episodes import AnsweredStep, answered_steps, asked_steps
from mulligan.testing.judge.history import BrokenRule, RecordedCall, named
from mulligan.testing.judge.state import Final, ToldEvaluation

RULE = "evaluations"
_WITH_REWARD = (1, 2)  # outcomes of the last step, as the contract numbers them
_MOST_UNSURE = 8  # attempts of an evaluation, of which each combination is looked at
_ROUNDING = 1e-9
_Possible = tuple[float | None, ...]  # rewards that an attempt may have; None: it was lost


@dataclass
class _Played:
    """What was begun of an evaluation: for each attempt its episodes, by the number of the restart."""

    environment: str
    attempts: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    calls: list[RecordedCall] = field(default_factory=list)


def check(calls: Sequence[RecordedCall], final: Final) -> Iterator[BrokenRule]:
    played = _played(calls, final.run_id)
    outcomes = _Outcomes(calls)
    told = Counter((one.step, one.environment) for one in final.evaluations)
    for (step, environment), count in told.items():
        if count > 1:
            yield BrokenRule(RULE, f"the evaluation after {step} steps {environment} has {count} events")
    if final.steps and (0, "") not in told:
        yield BrokenRule(RULE, "there is no evaluation before the first step")
    if final.state == "completed" and (final.steps, "") not in told:
        yield BrokenRule(RULE, "there is no evaluation after the last step")
    for one in final.evaluations:
        of = [begun for begun in played[one.step] if begun.environment == one.environment]
        if not any(_fits(one, outcomes.of(begun), final.threshold) for begun in of):
            earned = [outcomes.of(begun) for begun in of]
            begun = tuple(call for each in of for call in each.calls)
            yield BrokenRule(RULE, f"{one} was told; its attempts may have earned {earned}", begun)


def _played(calls: Sequence[RecordedCall], run_id: str) -> Mapping[int, Sequence[_Played]]:
    """By the steps that were trained."""
    name = re.compile(rf"{re.escape(run_id)}-evaluation-(\d+)(-e\d+)?-(t\d+-r\d+)-([^-]+)-(\d+)")
    found: dict[int, dict[tuple[str, str], _Played]] = defaultdict(dict)
    for call in named(calls, "StartEpisode"):
        if not (parts := name.fullmatch(call.request["episode_id"])):
            continue
        step, place, attempt, incarnation, restart = parts.groups()
        environment = call.request["environment"] if place else ""
        begun = found[int(step)].setdefault((environment, incarnation), _Played(environment))
        begun.attempts[attempt][int(restart)] = call.request["episode_id"]
        begun.calls.append(call)
    return defaultdict(list, {step: list(of.values()) for step, of in found.items()})


class _Outcomes:
    """What the attempts of an evaluation may have earned, as far as their calls show it."""

    def __init__(self, calls: Sequence[RecordedCall]):
        self._steps = answered_steps(calls)
        self._asked = asked_steps(calls)
        self._prompted: dict[str, int] = defaultdict(int)  # answers of the policy that were asked for, by episode
        for call in named(calls, "Generate", "GenerateMany"):
            for asked in [call.request] if call.name == "Generate" else call.request["requests"]:
                turn = asked.get("request_id", "").rpartition("-")[2]
                session = asked.get("session_id", "")
                if turn.isdecimal():
                    self._prompted[session] = max(self._prompted[session], int(turn) + 1)

    def of(self, begun: _Played) -> list[_Possible]:
        """Of each attempt: what its last episode earned."""
        return [self._earned(episodes[max(episodes)]) for episodes in begun.attempts.values()]

    def _earned(self, episode_id: str) -> _Possible:
        steps: dict[int, AnsweredStep] = {step.index: step for step in self._steps.get(episode_id, ())}
        asked = max(self._asked.get(episode_id, ()), default=-1)
        if not steps or asked not in steps:
            return (None,)  # it was never begun, or its last step has no answer
        last = steps[asked].answer
        if "reward" not in last or (last.get("done") and last.get("outcome", 0) not in _WITH_REWARD):
            return (None,)
        reward = total(step.answer.get("reward", 0.0) for step in steps.values())
        if last.get("done") or self._prompted[episode_id] == len(steps):
            return (reward,)  # it ended, or its limit ended it
        return reward, None  # the policy gave no further answer: the conversation was full, or the policy was lost


def _fits(told: ToldEvaluation, possible: Sequence[_Possible], threshold: float) -> bool:
    """Whether the attempts can have earned what was told."""
    if told.attempts + told.excluded != len(possible):
        return False
    unsure = sum(len(one) > 1 for one in possible)
    combinations = product(*possible) if unsure <= _MOST_UNSURE else ()
    return unsure > _MOST_UNSURE or any(_gives(told, rewards, threshold) for rewards in combinations)


def _gives(told: ToldEvaluation, rewards: Sequence[float | None], threshold: float) -> bool:
    earned = [reward for reward in rewards if reward is not None]
    if len(earned) != told.attempts:
        return False
    success = fmean(reaches(reward, threshold) for reward in earned)
    return abs(success - told.success) < _ROUNDING and abs(fmean(earned) - told.mean_reward) < _ROUNDING
