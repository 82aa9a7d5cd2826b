"""Episodes: each step is played once, whoever asks how often.

The model of an episode is the environment itself, played again with the actions that were answered. So the environments
have to be deterministic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mulligan.env.base import Environment, Episode, act
from mulligan.testing.judge.history import BrokenRule, RecordedCall, named

RULE = "episodes"


@dataclass(frozen=True, slots=True)
class AnsweredStep:
    index: int
    action: str
    answer: Mapping[str, Any]
    call: RecordedCall

    @property
    def done(self) -> bool:
        return bool(self.answer.get("done"))


@dataclass(frozen=True, slots=True)
class _Begun:
    """How an episode began. `source` is the episode that it is a copy of, after `steps` steps."""

    environment: str
    task_id: str
    observation: str
    call: RecordedCall
    source: str = ""
    steps: int = 0


def answered_steps(calls: Sequence[RecordedCall]) -> dict[str, list[AnsweredStep]]:
    """By episode, in the order in which the calls began."""
    found: dict[str, list[AnsweredStep]] = defaultdict(list)
    for call in named(calls, "StepEpisode", "StepEpisodes"):
        for asked, answer in _items(call):
            step = AnsweredStep(asked.get("step_index", 0), asked.get("action", ""), answer, call)
            found[asked["episode_id"]].append(step)
    return found


def asked_steps(calls: Sequence[RecordedCall]) -> dict[str, set[int]]:
    """By episode: the steps that somebody asked for, answered or not."""
    found: dict[str, set[int]] = defaultdict(set)
    for call in named(calls, "StepEpisode", "StepEpisodes"):
        for asked in [call.request] if call.name == "StepEpisode" else call.request["steps"]:
            found[asked["episode_id"]].add(asked.get("step_index", 0))
    return found


def _items(call: RecordedCall) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    if call.answer is None:
        return
    if call.name == "StepEpisode":
        if call.ok:
            yield call.request, call.answer
        return
    for asked, item in zip(call.request["steps"], call.answer.get("items", ()), strict=True):
        if "step" in item:
            yield asked, item["step"]


def check(calls: Sequence[RecordedCall], environments: Mapping[str, Environment]) -> Iterator[BrokenRule]:
    begun = _beginnings(calls)
    steps = answered_steps(calls)
    for episode_id in sorted(begun.keys() | steps.keys()):
        yield from _check_one(episode_id, begun, steps, environments)


def _beginnings(calls: Sequence[RecordedCall]) -> dict[str, list[_Begun]]:
    found: dict[str, list[_Begun]] = defaultdict(list)
    for call in named(calls, "StartEpisode", "ForkEpisode"):
        if not call.ok or call.answer is None:
            continue
        asked, shown = call.request, call.answer.get("observation", "")
        if call.name == "StartEpisode":
            found[asked["episode_id"]].append(_Begun(asked["environment"], asked["task_id"], shown, call))
        else:
            copied = _Begun("", "", shown, call, asked["episode_id"], asked.get("step_index", 0))
            found[asked["new_episode_id"]].append(copied)
    return found


def _check_one(
    episode_id: str,
    begun: Mapping[str, Sequence[_Begun]],
    steps: Mapping[str, Sequence[AnsweredStep]],
    environments: Mapping[str, Environment],
) -> Iterator[BrokenRule]:
    starts = begun.get(episode_id, ())
    answered = steps.get(episode_id, ())
    for one in starts[1:]:
        if (one.observation, one.task_id, one.source) != (starts[0].observation, starts[0].task_id, starts[0].source):
            yield BrokenRule(RULE, f"episode {episode_id} began in two ways", (starts[0].call, one.call))
    first: dict[int, AnsweredStep] = {}
    for step in answered:
        before = first.setdefault(step.index, step)
        if (before.action, before.answer) != (step.action, step.answer):
            what = f"step {step.index} of {episode_id} has two answers, or was played with two actions"
            yield BrokenRule(RULE, what, (before.call, step.call))
    last = max(first, default=-1)
    ended = min((index for index, step in first.items() if step.done), default=last)
    if ended < last:
        what = f"step {last} of {episode_id} was played after its end with step {ended}"
        yield BrokenRule(RULE, what, (first[ended].call, first[last].call))
    if not starts:
        if first:
            yield BrokenRule(RULE, f"episode {episode_id} was never begun", (first[last].call,))
        return
    yield from _replayed(episode_id, starts[0], first, begun, steps, environments)


def _replayed(
    episode_id: str,
    start: _Begun,
    played: Mapping[int, AnsweredStep],
    begun: Mapping[str, Sequence[_Begun]],
    steps: Mapping[str, Sequence[AnsweredStep]],
    environments: Mapping[str, Environment],
) -> Iterator[BrokenRule]:
    """Compares with the environment, up to a step whose answer nobody got."""
    episode, shown = _model(start, begun, steps, environments)
    if episode is None:
        return
    if shown != start.observation:
        yield BrokenRule(RULE, f"{episode_id} began with {start.observation!r}, not {shown!r}", (start.call,))
        return
    index = start.steps
    while step := played.get(index):
        index += 1
        if step.answer.get("outcome", 0) > 2 or "reward" not in step.answer:
            return  # the environment failed there
        expected = act(episode, step.action)
        found = (step.answer.get("observation", ""), step.answer["reward"], step.done)
        wanted = (expected.observation, expected.reward, expected.done)
        if found != wanted:
            yield BrokenRule(RULE, f"step {step.index} of {episode_id} is {found}, not {wanted}", (step.call,))
            return
        if expected.done:
            return


def _model(
    start: _Begun,
    begun: Mapping[str, Sequence[_Begun]],
    steps: Mapping[str, Sequence[AnsweredStep]],
    environments: Mapping[str, Environment],
) -> tuple[Episode | None, str]:
    """The episode as it begins, and what it shows; None where an answer that led there is not known."""
    if not start.source:
        episode = environments[start.environment].start(start.task_id)
        return episode, episode.observation
    if start.source not in begun:
        return None, ""
    copied, shown = _model(begun[start.source][0], begun, steps, environments)
    known = {step.index: step for step in steps.get(start.source, ())}
    for index in range(begun[start.source][0].steps, start.steps):
        if copied is None or index not in known:
            return None, ""
        shown = act(copied, known[index].action).observation
    return copied, shown
