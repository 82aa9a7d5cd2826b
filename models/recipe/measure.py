"""Measures the model on the environment's test boards, with assignments that it was and was not trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from mulligan.env.envs.frozenlake.boards import GOAL, HOLE, PLAYER
from mulligan.env.envs.frozenlake.environment import FrozenLake, Settings
from mulligan.models.build import LETTERS, ROLES
from mulligan.models.recipe.boards import ALPHABET, CELLS, tables
from mulligan.models.recipe.sampling import SampledAttempt, Sampling, attempt_all, reflect_all

FIXED_SYMBOLS = "ABCD"


@cache
def environment(symbols: str = FIXED_SYMBOLS) -> FrozenLake:
    settings = Settings(size_min=3, size_max=3, symbols=symbols, prompts="compact", name="frozenlake_small")
    return FrozenLake(settings)


def legend(symbols: str) -> str:
    return "\n".join(f"{letter} {role}" for letter, role in zip(symbols, ROLES, strict=True))


def other_symbols(number: int, seed: int = 0) -> list[str]:
    """Assignments other than the fixed one."""
    rng = random.Random(seed)
    found = set[str]()
    while len(found) < number:
        symbols = "".join(rng.sample(LETTERS[:ALPHABET], 4))
        if symbols != FIXED_SYMBOLS:
            found.add(symbols)
    return sorted(found)


def random_play(boards: int) -> float:
    """The exact success rate of uniformly random moves on the test boards."""
    lake = environment()
    wins = 0.0
    for index in range(boards):
        cells = np.array(list("".join(lake.board(_task(index)).rows)))
        chances = (cells == PLAYER).astype(np.float64)
        for _ in range(lake.info.max_steps):
            reached = np.zeros(CELLS)
            np.add.at(reached, tables().next_cell, np.repeat(chances[:, None] / 4, 4, axis=1))
            wins += float(reached[cells == GOAL].sum())
            chances = np.where((cells == GOAL) | (cells == HOLE), 0.0, reached)
    return round(wins / boards, 3)


@dataclass(frozen=True)
class Meter:
    model: Qwen3ForCausalLM
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    boards: int = 100

    def first_attempts(self, *symbols: str, seed: int = 0) -> list[float]:
        """The success rate with each assignment. All are played in one batch."""
        solver = environment().info.prompts.solver
        lakes = [environment(letters) for letters in symbols]
        rewards = [attempt.reward for attempt in self._play(lakes, [solver] * self.boards, seed)]
        return [_mean(rewards[start : start + self.boards]) for start in range(0, len(rewards), self.boards)]

    def with_legend(self, text: str, seed: int = 0) -> float:
        return _mean([attempt.reward for attempt in self._play([environment()], [_second(text)] * self.boards, seed)])

    def with_shuffled_legends(self, seed: int = 0) -> float:
        """The success rate with wrong legends: the four right letters in a wrong order."""
        rng = random.Random(seed)
        wrong: list[str] = []
        while len(wrong) < self.boards:
            letters = "".join(rng.sample(FIXED_SYMBOLS, 4))
            if letters != FIXED_SYMBOLS:
                wrong.append(_second(legend(letters)))
        return _mean([attempt.reward for attempt in self._play([environment()], wrong, seed)])

    def second_attempts(self, memory: str = "", seed: int = 0) -> dict[str, float]:
        """Plays first attempts, reflects on the failed ones, and plays second attempts on the same boards."""
        lake = environment()
        prompts = lake.info.prompts
        first = self._play([lake], [prompts.solver] * self.boards, seed)
        failed = [(index, attempt) for index, attempt in enumerate(first) if attempt.reward < 1]
        asked = [(attempt, memory) for _, attempt in failed]
        written = reflect_all(self.model, self.tokenizer, prompts, asked, self.sampling, seed + 1)
        tasks = [(lake.start(_task(index)), _second(text)) for (index, _), text in zip(failed, written, strict=True)]
        second = attempt_all(self.model, self.tokenizer, lake.info, tasks, self.sampling, seed + 2)
        right = legend(FIXED_SYMBOLS)
        return {
            "failed_first_attempts": len(failed),
            "legends_entirely_right": _mean([text == right for text in written]),
            "legend_lines_right": _mean([line in right.split("\n") for text in written for line in text.split("\n")]),
            "second_attempt_success": _mean([attempt.reward for attempt in second]),
        }

    def _play(self, lakes: Sequence[FrozenLake], systems: Sequence[str], seed: int) -> list[SampledAttempt]:
        tasks = [(lake.start(_task(index)), system) for lake in lakes for index, system in enumerate(systems)]
        return attempt_all(self.model, self.tokenizer, lakes[0].info, tasks, self.sampling, seed)


def _task(index: int) -> str:
    return f"test/{index:05d}"


def _second(text: str) -> str:
    return f"{text}\n{environment().info.prompts.action_reminder}"


def _mean(values: Sequence[float | bool]) -> float:
    return round(sum(values) / max(len(values), 1), 3)
