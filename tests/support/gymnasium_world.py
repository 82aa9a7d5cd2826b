"""Environments of Gymnasium that the adapter is tested with; importing it registers them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Everything(gymnasium.Env[Any, Any]):
    """Echoes its actions. Each space there is, in and out; a random number each step."""

    def __init__(self, crash: bool = False) -> None:
        self._crash = crash
        self.closed = False
        self.action_space = spaces.Dict(
            {
                "move": spaces.Discrete(3, start=-1),
                "force": spaces.Box(-1.0, np.array([0.7, 2.0], np.float32), dtype=np.float32),
                "say": spaces.Text(8, charset="abc "),
                "bits": spaces.MultiBinary(2),
                "counts": spaces.MultiDiscrete([2, 3]),
                "pair": spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 255, (2, 2), np.uint8))),
                "some": spaces.Sequence(spaces.Discrete(4)),
                "either": spaces.OneOf((spaces.Discrete(2), spaces.Text(3))),
            }
        )
        self.observation_space = spaces.Dict(
            {
                "drawn": spaces.Box(0.0, 1.0, (2,)),
                "grid": spaces.Box(0, 9, (2, 2), np.int64),
                "heard": spaces.Text(8, min_length=0),
                "graph": spaces.Graph(spaces.Discrete(5), spaces.Discrete(2)),
                "steps": spaces.Sequence(spaces.Discrete(9)),
                "either": spaces.OneOf((spaces.Discrete(2), spaces.Text(3))),
                "pair": spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary(2))),
            }
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._count = 0
        return self._observed(""), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        if self._crash:
            raise RuntimeError("the bridge is out")
        self._count += 1
        return self._observed(action["say"]), 0.25, self._count == 4, False, {}

    def close(self) -> None:
        self.closed = True

    def _observed(self, heard: str) -> dict[str, Any]:
        return {
            "drawn": self.np_random.random(2),
            "grid": np.arange(4).reshape(2, 2),
            "heard": heard,
            "graph": spaces.GraphInstance(np.array([1, 4]), np.array([0]), np.array([[0, 1]])),
            "steps": tuple(range(self._count)),
            "either": (1, "abc"),
            "pair": (1, np.array([0, 1], np.int8)),
        }


class Talk(gymnasium.Env[str, str]):
    """An action is text: right when it is the word that was said."""

    action_space: spaces.Space[Any] = spaces.Text(20, min_length=1, charset="abcdefghijklmnopqrstuvwxyz ")
    observation_space: spaces.Space[Any] = spaces.Text(20)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._word = str(self.np_random.choice(["moon", "river", "stone"]))
        return self._word, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", float(action == self._word), action == self._word, False, {}


class Unseeded(Talk):
    """Says that it is deterministic, and draws from a generator that no seed reaches."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        return f"{random.random():.12f}", {}


class Pixels(Talk):
    observation_space = spaces.Box(0, 255, (210, 160, 3), np.uint8)


class Graphs(Talk):
    action_space = spaces.Dict({"deep": spaces.Tuple((spaces.Graph(spaces.Discrete(5), None),))})


def register(name: str, entry_point: Callable[..., gymnasium.Env[Any, Any]], **more: Any) -> None:
    if name not in gymnasium.registry:
        gymnasium.register(name, entry_point, **more)


register("Everything-v0", Everything, max_episode_steps=6)
register("Talk-v0", Talk, max_episode_steps=3)
register("Dreams-v0", Talk, max_episode_steps=3, nondeterministic=True)
register("Unseeded-v0", Unseeded, max_episode_steps=3)
register("Pixels-v0", Pixels, max_episode_steps=3)
register("Graphs-v0", Graphs, max_episode_steps=3)
