"""Settings of the environment service, and which environments it serves.

Each TOML table `[environments.NAME]` is one: `kind` is the module that makes it, `feedback` how much an agent is told
at the end (full, unary or silent), the rest are that environment's own settings. A kind without a dot is a file in
`services/env/envs/`; one with a dot is any module that can be imported:

    [environments.small-lake]
    kind = "frozenlake"
    size_max = 4
    feedback = "unary"
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from pydantic import Field

from services.common.config import ServiceSettings
from services.env.base import Environment, EnvironmentInfo, MissingExtra, PromptSet, Split, TaskInfo, UnknownTask
from services.env.episodes import Limits
from services.env.feedback import Feedback, with_feedback

DEFAULT_ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "frozenlake": {"kind": "frozenlake"},
    "frozenlake-3x3": {"kind": "frozenlake", "size_min": 3, "size_max": 3, "prompts": "compact"},
    "sokoban": {"kind": "sokoban"},
    "hotpotqa": {"kind": "hotpotqa"},
}


class EnvSettings(ServiceSettings):
    service: ClassVar[str] = "env"

    environments: dict[str, dict[str, Any]] = Field(
        DEFAULT_ENVIRONMENTS, min_length=1, description="Tables with `kind` and that environment's own settings."
    )
    max_episodes: int = Field(4096, ge=1, description="Live episodes; more are refused with CAPACITY_REACHED.")
    max_finished: int = Field(4096, ge=0, description="Episodes that are over whose answers stay repeatable.")
    lease_seconds: float = Field(600.0, gt=0, le=86_400, description="An episode idle for longer expires.")
    step_timeout_seconds: float = Field(60.0, gt=0, description="A step that takes longer is a TIMEOUT.")
    worker_threads: int = Field(16, ge=1, le=512, description="Threads for environment code.")
    max_hanging_threads: int = Field(64, ge=0, description="Threads lost to hanging steps that are replaced.")

    @property
    def limits(self) -> Limits:
        return Limits(self.max_episodes, self.max_finished, lease_seconds=self.lease_seconds)

    def create_environments(self) -> dict[str, Environment]:
        """Raises ValueError that names the setting."""
        return {name: _create(name, dict(settings)) for name, settings in self.environments.items()}


def _create(name: str, settings: dict[str, Any]) -> Environment:
    kind = settings.pop("kind", None)
    if not isinstance(kind, str) or not kind:
        raise ValueError(f"environments.{name}.kind: names the module that makes the environment, e.g. frozenlake")
    given = settings.pop("feedback", Feedback.FULL)
    if given not in tuple(Feedback):
        raise ValueError(f"environments.{name}.feedback: expected {', '.join(Feedback)}, not {given!r}")
    module = kind if "." in kind else f"services.env.envs.{kind}"
    try:
        create = importlib.import_module(module).create
    except (ImportError, AttributeError) as error:
        raise ValueError(f"environments.{name}.kind: {kind!r} is no environment: {error}") from error
    try:
        environment: Environment = create(name, settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"environments.{name}: {error}") from error
    except MissingExtra as error:
        return _Unavailable(name, str(error))
    return with_feedback(environment, Feedback(given))


class _Unavailable:
    """Stands for an environment that is not installed, so that a client is told why and what to install."""

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
