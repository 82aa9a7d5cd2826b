"""Rules for the steps of every episode. Each rule yields what is wrong, in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from mulligan.common.rewards import reaches, total
from mulligan.common.v1 import outcome_pb2
from mulligan.conformance.env.game import PlayedEpisode
from mulligan.env.v1 import env_service_pb2 as pb

Rule = Callable[[pb.EnvironmentInfo, PlayedEpisode], Iterator[str]]
_ENDS = (outcome_pb2.OUTCOME_COMPLETED, outcome_pb2.OUTCOME_TRUNCATED)
_ROUNDING = 1e-6


def outcome(step: pb.StepEpisodeResponse) -> str:
    return str(outcome_pb2.Outcome.Name(step.outcome))


def unbroken(info: pb.EnvironmentInfo, episode: PlayedEpisode) -> Iterator[str]:
    """No step failed."""
    if episode.broken:
        last = episode.steps[-1]
        action = repr(episode.actions[-1][:80])
        yield f"step {len(episode.steps) - 1}, {action}, ended with {outcome(last)}: {last.error or 'no error given'}"


def failure(info: pb.EnvironmentInfo, episode: PlayedEpisode) -> Iterator[str]:
    """A failed step is the last, has no reward and says what went wrong."""
    if episode.broken:
        last = episode.steps[-1]
        if last.HasField("reward"):
            yield f"the step that ended with {outcome(last)} has reward {last.reward:g}"
        if not last.done:
            yield f"the episode goes on after {outcome(last)}"
        if not last.error:
            yield f"error is empty after {outcome(last)}"


def ends(info: pb.EnvironmentInfo, episode: PlayedEpisode) -> Iterator[str]:
    """It ends on its own as COMPLETED, or after max_steps steps as TRUNCATED."""
    count = len(episode.steps)
    if count > info.max_steps:
        yield f"it had {count} steps, and max_steps is {info.max_steps}"
    if count == info.max_steps and not episode.over:
        yield f"it goes on after {count} steps, and max_steps is {info.max_steps}"
    if episode.over and episode.steps[-1].outcome == outcome_pb2.OUTCOME_TRUNCATED and count < info.max_steps:
        yield f"it was TRUNCATED after {count} steps, and max_steps is {info.max_steps}"


def outcomes(info: pb.EnvironmentInfo, episode: PlayedEpisode) -> Iterator[str]:
    """The outcome is there with `done` and not before."""
    for index, step in enumerate(episode.steps):
        if step.done and not episode.broken and step.outcome not in _ENDS:
            yield f"step {index} is the last, with {outcome(step)}"
        if not step.done and step.outcome != outcome_pb2.OUTCOME_UNSPECIFIED:
            yield f"step {index} is not the last (done is false), with {outcome(step)}"


def closing_words(info: pb.EnvironmentInfo, episode: PlayedEpisode) -> Iterator[str]:
    """Feedback on the last step only, errors of failed steps only."""
    for index, step in enumerate(episode.steps):
        if step.feedback and not step.done:
            yield f"step {index} is not the last, and its feedback is {step.feedback[:80]!r}"
        if step.error and not (episode.broken and step.done):
            yield f"step {index} went well, and its error is {step.error[:80]!r}"


def rewards(info: pb.EnvironmentInfo, episode: PlayedEpisode) -> Iterator[str]:
    """A finite reward of each step, together at most max_reward."""
    gained: list[list[float]] = [[] for _ in range(max(info.player_count, 1))]
    for index, step in enumerate(episode.steps[:-1] if episode.broken else episode.steps):
        if not step.HasField("reward"):
            yield f"step {index} went well, and has no reward"
        elif not math.isfinite(step.reward):
            yield f"step {index} has reward {step.reward}"
        for player, reward in enumerate(step.rewards or [step.reward]):
            if player < len(gained):
                gained[player].append(reward)
    most = max(map(total, gained))
    if not reaches(info.max_reward, most):
        yield f"the rewards add up to {most:g}, and max_reward is {info.max_reward:g}"


def of_players(info: pb.EnvironmentInfo, episode: PlayedEpisode) -> Iterator[str]:
    """Players in range; a reward per player where there are several, and none where there is one."""
    count = 0 if info.player_count == 1 else info.player_count
    player = episode.begun.player
    for index, step in enumerate(episode.steps[:-1] if episode.broken else episode.steps):
        if not 0 <= step.player < info.player_count:
            yield f"after step {index} it is player {step.player}'s turn, and there are {info.player_count}"
        if len(step.rewards) != count:
            yield f"step {index} has {len(step.rewards)} rewards, and player_count is {info.player_count}"
        elif count and 0 <= player < count and not math.isclose(step.rewards[player], step.reward, abs_tol=_ROUNDING):
            yield f"player {player} acted in step {index}: reward {step.reward:g}, in rewards {step.rewards[player]:g}"
        player = step.player


def tools(info: pb.EnvironmentInfo, episode: PlayedEpisode) -> Iterator[str]:
    """A tool that speaks is one that the environment lists."""
    names = {tool.name for tool in info.tools} | {""}
    for index, step in enumerate(episode.steps):
        if step.tool not in names:
            yield f"step {index} is an answer of the tool {step.tool!r}, which tools does not list"


ALL: tuple[Rule, ...] = (unbroken, failure, ends, outcomes, closing_words, rewards, of_players, tools)
