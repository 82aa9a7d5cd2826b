"""Plays episodes of an environment without a server: `python -m mulligan.conformance.replay`, JSON in and out.

A play in a second process differs if it depends on hash seeds, module state or the order of sets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mulligan.env.base import Environment, act, close
from mulligan.env.config import EnvSettings

SECONDS = 120.0
Play = tuple[str, Sequence[str]]  # a task's id, and actions


class ReplayFailed(Exception):
    """The second process could not play; the message has the end of its output."""


def make(kind: str, settings: Mapping[str, Any]) -> Environment:
    """The environment that a server would make of a table with this `kind` and these settings. Raises ValueError that
    names the setting."""
    name = kind.rpartition(".")[2]
    return EnvSettings(environments={name: {"kind": kind, **settings}}).create_environments()[name]


def play(environment: Environment, plays: Sequence[Play]) -> list[list[dict[str, Any]]]:
    """For each play, what an agent sees: the first observation, then each step. An exception is the last entry."""
    return [_played(environment, task_id, actions) for task_id, actions in plays]


def _played(environment: Environment, task_id: str, actions: Sequence[str]) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    try:
        episode = environment.start(task_id)
        seen.append({"observation": episode.observation})
        for action in actions:
            step = act(episode, action)
            seen.append({"observation": step.observation, "action": step.action, "reward": step.reward})
            if step.done:
                break
        close(episode)
    except Exception as error:  # noqa: BLE001 - an environment may raise anything; the comparison shows it
        seen.append({"error": f"{type(error).__name__}: {error}"})
    return seen


def play_elsewhere(kind: str, settings: Mapping[str, Any], plays: Sequence[Play]) -> list[list[dict[str, Any]]]:
    """The same as `play`, in another process. Raises ReplayFailed."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    try:
        process = subprocess.run(
            [sys.executable, "-m", "mulligan.conformance.replay"],
            input=json.dumps({"kind": kind, "settings": dict(settings), "plays": list(plays)}),
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "12345"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ReplayFailed(f"it was not done after {SECONDS:g} s") from None
    if process.returncode:
        raise ReplayFailed(process.stderr.strip()[-1000:])
    found: list[list[dict[str, Any]]] = json.loads(process.stdout.splitlines()[-1])
    return found


def main() -> None:
    asked = json.load(sys.stdin)
    environment = make(asked["kind"], asked["settings"])
    print(f"\n{json.dumps(play(environment, asked['plays']))}")


if __name__ == "__main__":
    main()
