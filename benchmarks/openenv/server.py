"""FrozenLake behind an OpenEnv server: `python -m benchmarks.openenv.server [--port 8000]`, in OpenEnv's environment.

The environment is written as OpenEnv's template and documentation say: a class with `reset` and `step`, concurrent
sessions enabled, served by `create_app` and uvicorn. `reset(seed=N)` starts board `train/N`, `reset(task_id=…)` any
board. The one addition is a line of JSON that tells the address, as our services print it.
"""

from __future__ import annotations

import argparse
import json
import socket
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_app

from mulligan.env.envs.frozenlake.environment import FrozenLake, FrozenLakeEpisode

MAX_SESSIONS = 16_384  # OpenEnv's own limit, out of the way: the benchmark finds the real one
_BACKLOG = 2048  # uvicorn's default
_LAKE = FrozenLake()  # all sessions share its cache of boards


class LakeAction(Action):  # type: ignore[misc]  # OpenEnv is not installed where the types are checked
    text: str


class LakeObservation(Observation):  # type: ignore[misc]
    """What a step of our service tells, besides OpenEnv's `reward` and `done`."""

    text: str
    reading: str = ""
    truncated: bool = False
    feedback: str = ""


class LakeEnvironment(Environment):  # type: ignore[misc]
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._state = State()
        self._episode: FrozenLakeEpisode | None = None

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, task_id: str = "", **kwargs: Any
    ) -> LakeObservation:
        self._episode = _LAKE.start(task_id or f"train/{(seed or 0) % _LAKE.settings.train_tasks:05d}")
        self._state = State(episode_id=episode_id, step_count=0)
        return LakeObservation(text=self._episode.observation)

    def step(self, action: LakeAction, timeout_s: float | None = None, **kwargs: Any) -> LakeObservation:
        if self._episode is None:
            raise RuntimeError("no episode: call reset first")
        result = self._episode.step(action.text)
        self._state.step_count += 1
        if result.done:
            self._episode = None
        return LakeObservation(
            text=result.observation,
            reading=result.action,
            reward=result.reward,
            done=result.done,
            truncated=result.truncated,
            feedback=result.feedback,
        )

    @property
    def state(self) -> State:
        return self._state


def main() -> None:
    parser = argparse.ArgumentParser(description="FrozenLake behind an OpenEnv server.")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    port = parser.parse_args().port
    app = create_app(
        LakeEnvironment, LakeAction, LakeObservation, env_name="frozenlake", max_concurrent_envs=MAX_SESSIONS
    )
    with socket.create_server(("127.0.0.1", port), backlog=_BACKLOG) as listening:
        host, bound = listening.getsockname()
        print(json.dumps({"event": "serving", "address": f"{host}:{bound}"}), flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="critical")).run(sockets=[listening])


if __name__ == "__main__":
    main()
