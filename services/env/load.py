"""Makes an environment of its table in the configuration: in the server, or in the process of an untrusted one."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from mulligan.env.base import Environment, EnvironmentInfo, MissingExtra, PromptSet, Split, TaskInfo, UnknownTask
from mulligan.env.feedback import Feedback, with_feedback

_ENVIRONMENTS = "mulligan.env.envs"


def load(name: str, table: Mapping[str, Any]) -> Environment:
    """Raises ValueError that names the setting, and MissingExtra."""
    settings = dict(table)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str) or not kind:
        raise ValueError(f"environments.{name}.kind: names the module that makes the environment, e.g. frozenlake")
    given = settings.pop("feedback", Feedback.FULL)
    if given not in tuple(Feedback):
        raise ValueError(f"environments.{name}.feedback: expected {', '.join(Feedback)}, not {given!r}")
    create = _find(name, kind)
    try:
        environment = create(name, settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"environments.{name}: {error}") from error
    return with_feedback(environment, Feedback(given))


def _find(name: str, kind: str) -> Callable[[str, Mapping[str, Any]], Environment]:
    """A kind without a dot is a file of `services/env/envs/`, or else a module like any other."""
    module = kind if "." in kind or not _comes_along(kind) else f"{_ENVIRONMENTS}.{kind}"
    try:
        create: Callable[[str, Mapping[str, Any]], Environment] = importlib.import_module(module).create
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        tried = "" if "." in kind or module != kind else f"no file services/env/envs/{kind}.py, and as a module: "
        raise ValueError(f"environments.{name}.kind: {kind!r} is no environment: {tried}{error}") from error
    return create


def _comes_along(kind: str) -> bool:
    return kind.isidentifier() and importlib.util.find_spec(f"{_ENVIRONMENTS}.{kind}") is not None


class Unavailable:
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


def load_or_explain(name: str, table: Mapping[str, Any]) -> Environment:
    """Raises ValueError that names the setting. What lacks packages is listed as unavailable."""
    try:
        return load(name, table)
    except MissingExtra as error:
        return Unavailable(name, str(error))
