"""Makes an environment from its table in the configuration: in the server, or in the host process of an untrusted
one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mulligan.common.plugins import UnusablePlugin
from mulligan.env.base import (
    Environment,
    EnvironmentInfo,
    MissingExtra,
    PromptSet,
    Split,
    TaskInfo,
    UnknownTask,
    own_settings,
)
from mulligan.env.envs import ENVIRONMENTS
from mulligan.env.feedback import Feedback, with_feedback


def load(name: str, table: Mapping[str, Any]) -> Environment:
    """Makes an environment. Raises ValueError, which names the setting, and MissingExtra."""
    settings = dict(table)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str) or not kind:
        known = ", ".join(ENVIRONMENTS.names)
        raise ValueError(f"environments.{name}.kind: names the environment: {known}, or a module")
    given = settings.pop("feedback", Feedback.FULL)
    if given not in tuple(Feedback):
        raise ValueError(f"environments.{name}.feedback: expected {', '.join(Feedback)}, not {given!r}")
    try:
        plugin = ENVIRONMENTS.find(kind)
    except UnusablePlugin as error:
        raise ValueError(f"environments.{name}.kind: {error}") from error
    try:
        environment: Environment = plugin.create(name, own_settings(plugin, settings))
    except (ValueError, TypeError) as error:
        raise ValueError(f"environments.{name}: {error}") from error
    return with_feedback(environment, Feedback(given))


class Unavailable:
    """Replaces an environment that lacks packages. Clients are told why, and what to install."""

    def __init__(self, name: str, reason: str) -> None:
        self.info = EnvironmentInfo(
            name=name,
            description="not installed",
            prompts=PromptSet("", "", "", "", "", "", "", ""),
            max_steps=0,
            max_reward=0.0,
            deterministic=False,
            task_counts=dict.fromkeys(Split, 0),
            unavailable=reason,
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        return ()

    def start(self, task_id: str) -> NoReturn:
        raise UnknownTask(f"{self.info.name!r} {self.info.unavailable}")


def load_or_explain(name: str, table: Mapping[str, Any]) -> Environment:
    """As `load`, but an environment that lacks packages is listed as unavailable."""
    try:
        return load(name, table)
    except MissingExtra as error:
        return Unavailable(name, str(error))
