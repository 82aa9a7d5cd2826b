"""Converts protobuf messages to the types of the environment client, and checks their numbers."""

from __future__ import annotations

from mulligan.common.numbers import finite, not_negative
from mulligan.common.rewards import LARGEST_REWARD, is_usable
from mulligan.common.types import EnvironmentInfo, EpisodeStep, Outcome, PromptSet, Split, TaskInfo
from mulligan.common.wire import outcome_from_proto, tools_from_proto
from mulligan.env.v1 import env_service_pb2 as pb

_SPLITS_BACK = {pb.SPLIT_TRAIN: Split.TRAIN, pb.SPLIT_TEST: Split.TEST}
_FAILED = (Outcome.ENV_ERROR, Outcome.TIMEOUT)


def step_from_proto(response: pb.StepEpisodeResponse) -> EpisodeStep:
    """A step with an invalid reward counts as failed and ends the episode, whatever the server says."""
    done = response.done
    outcome = outcome_from_proto(response.outcome) if done else None  # only the last step has one
    reward = response.reward if response.HasField("reward") else None
    if outcome in _FAILED:
        reward = None
    elif reward is None or not is_usable(reward) or (response.rewards and not all(map(is_usable, response.rewards))):
        return _failed(response, reward)
    return EpisodeStep(
        response.observation,
        response.action,
        reward,
        done,
        outcome,
        response.feedback if done else "",
        response.error if done else "",
        response.tool,
        response.player,
        tuple(response.rewards),
    )


def _failed(response: pb.StepEpisodeResponse, reward: float | None) -> EpisodeStep:
    given = "no reward" if reward is None else f"reward {reward}"
    rewards = f" and rewards {[*response.rewards]!r:.200}" if response.rewards else ""
    error = f"the server answered {given}{rewards}, not a number from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}"
    return EpisodeStep("", response.action, None, True, Outcome.ENV_ERROR, error=error)


def tasks_from_proto(response: pb.ListTasksResponse) -> list[TaskInfo]:
    for task in response.tasks:
        finite("difficulty", [task.difficulty])
    return [
        TaskInfo(task.task_id, _SPLITS_BACK[task.split], task.difficulty, dict(task.tags)) for task in response.tasks
    ]


def info_from_proto(info: pb.EnvironmentInfo) -> EnvironmentInfo:
    """An environment with invalid numbers is listed as unavailable."""
    try:
        finite("max_reward", [info.max_reward])
        not_negative("train_task_count", [info.train_task_count])
        not_negative("test_task_count", [info.test_task_count])
        not_negative("max_steps", [info.max_steps])
    except ValueError as error:
        wrong = pb.EnvironmentInfo(name=info.name, description=info.description)
        wrong.unavailable = info.unavailable or f"its server reports {error}"
        info = wrong
    return EnvironmentInfo(
        name=info.name,
        description=info.description,
        prompts=_prompts(info.prompts),
        max_steps=info.max_steps,
        max_reward=info.max_reward,
        deterministic=info.deterministic,
        task_counts={Split.TRAIN: info.train_task_count, Split.TEST: info.test_task_count},
        tools=tools_from_proto(info.tools),
        unavailable=info.unavailable,
        can_fork=info.can_fork,
        player_count=max(info.player_count, 1),  # an older server leaves it at 0
    )


def _prompts(prompts: pb.PromptSet) -> PromptSet:
    return PromptSet(
        solver=prompts.solver,
        action_reminder=prompts.action_reminder,
        reflection_system=prompts.reflection_system,
        reflection=prompts.reflection,
        memory_empty=prompts.memory_empty,
        trace_turn=prompts.trace_turn,
        retry=prompts.retry,
        try_again=prompts.try_again,
        reflection_open=prompts.reflection_open,
        reflection_close=prompts.reflection_close,
    )
