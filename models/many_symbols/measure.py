"""Measures the model on the environment's test boards, with the assignment that it was never trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from mulligan.env.envs.frozenlake.environment import FrozenLake, Settings
from mulligan.models.build import ROLES
from mulligan.models.recipe.sampling import SampledAttempt, Sampling, attempt_all, reflect_all, reflection_text

SYMBOLS = "A B CEG DFH"


@cache
def environment() -> FrozenLake:
    return FrozenLake(Settings(size_min=3, size_max=3, symbols=SYMBOLS, prompts="compact", name="frozenlake-symbols"))


def legend(symbols: str = SYMBOLS) -> str:
    groups = zip(symbols.split(" "), ROLES, strict=True)
    return "\n".join(f"{letter} {role}" for group, role in groups for letter in sorted(group))


def measure(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, boards: int) -> dict[str, float]:
    """Shares of successes, sampled at temperature 1: one attempt at each board, second attempts where it failed."""
    play = _Player(model, tokenizer, boards)
    prompts = environment().info.prompts
    first = play([prompts.solver] * boards)
    failed = [(index, attempt) for index, attempt in enumerate(first) if attempt.reward < 1]
    episodes = [
        reflection_text(prompts, attempt, "").removesuffix(f"\n{prompts.memory_empty}") for _, attempt in failed
    ]
    figures = {
        "first_attempt": _mean(first),
        "first_attempt_whole_legend": _mean(play([_guided(legend())] * boards)),
        "first_attempt_wrong_legends": _mean(play([_guided(_mixed(seed)) for seed in range(boards)])),
        "first_attempt_one_episode": _mean(play([_guided(episodes[n % len(episodes)]) for n in range(boards)])),
    }
    for name, memory in (
        ("no_memory", [""] * len(failed)),
        ("whole_legend", [legend()] * len(failed)),
        ("wrong_legends", [_mixed(seed) for seed in range(len(failed))]),
        ("another_episode", [*episodes[1:], episodes[0]]),
    ):
        asked = [(attempt, text) for (_, attempt), text in zip(failed, memory, strict=True)]
        written = reflect_all(model, tokenizer, prompts, asked, Sampling(), 1, legend_tokens=40)
        second = play([_guided(text) for text in written], [index for index, _ in failed])
        figures[f"second_attempt_{name}"] = _mean(second)
        right = set(legend().split("\n"))
        lines = [line for text in written for line in text.split("\n")]
        figures[f"lines_{name}"] = round(len(lines) / len(written), 2)
        figures[f"lines_right_{name}"] = round(sum(line in right for line in lines) / len(lines), 3)
    return figures


class _Player:
    def __init__(self, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, boards: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._boards = boards

    def __call__(self, systems: Sequence[str], boards: Sequence[int] = ()) -> list[SampledAttempt]:
        lake = environment()
        indices = boards or range(self._boards)
        tasks = [(lake.start(f"test/{index:05d}"), system) for index, system in zip(indices, systems, strict=True)]
        return attempt_all(self._model, self._tokenizer, lake.info, tasks, Sampling())


def _mixed(seed: int) -> str:
    """A legend with all letters in the wrong places."""
    letters = SYMBOLS.replace(" ", "")
    rng = random.Random(seed)
    while True:
        shuffled = "".join(rng.sample(letters, len(letters)))
        groups = f"{shuffled[0]} {shuffled[1]} {shuffled[2:5]} {shuffled[5:]}"
        if not set(legend(groups).split("\n")) & set(legend().split("\n")):
            return legend(groups)


def _guided(text: str) -> str:
    return f"{text}\n{environment().info.prompts.action_reminder}"


def _mean(attempts: Sequence[SampledAttempt]) -> float:
    return round(sum(attempt.reward for attempt in attempts) / len(attempts), 3)
