"""The process in which reasoning-gym makes questions and scores answers. Its arguments: seconds and bytes.

This runs in a separate process for four reasons. Some generators depend on Python's hash seed, which is fixed here. The
import takes seconds. A question can take a second, all of it under the interpreter's lock. And scoring evaluates
answers: several datasets pass an answer to `eval` or to sympy's parser, which also evaluates it. Here
`ast.literal_eval` replaces `eval`, and the parser sees only the names of formulas. The process cannot write files, its
memory is limited, and the kernel ends it when a request takes too long.

Reads requests from stdin and writes answers to stdout, a line of JSON each, until stdin ends.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import os
import random
import re
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO

from cachetools import LRUCache

from mulligan.env.envs.reasoning_gym.pool import SIZE

_LOAD_SECONDS = 300
_KEPT = 256  # datasets, and entries: a score is mostly asked for soon after its question
_EVALUATING = (
    "algorithmic.string_insertion",
    "algorithmic.spiral_matrix",
    "algorithmic.binary_matrix",
    "games.n_queens",
)
_PARSED = ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration")
_FUNCTIONS = ("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh")
_FORMULA_NAMES = frozenset((*_FUNCTIONS, "exp", "log", "ln", "sqrt", "Abs", "pi", "erf", "Rational"))
_NAME = re.compile(r"[^\W\d]\w*")
_EXPONENT = re.compile(r"(?<=[0-9.])[eE](?=[+-]?[0-9])")
_FORMULA = re.compile(r"[\w\s+\-*/^().,=]*")


class Datasets:
    """The datasets of the distribution. Each is made when it is first needed."""

    def __init__(self, settings: dict[str, dict[str, Any]]) -> None:
        import numpy as np
        from reasoning_gym import factory

        for module in _EVALUATING:
            setattr(importlib.import_module(f"reasoning_gym.{module}"), "eval", ast.literal_eval)  # noqa: B010 - for mypy
        self._factory = factory
        self._numpy = np
        self._settings = settings
        self._made: LRUCache[tuple[str, int], Any] = LRUCache(_KEPT)
        self._entries: LRUCache[tuple[str, int, int], dict[str, Any]] = LRUCache(_KEPT)

    def check(self, name: str) -> None:
        """Makes the dataset. Raises what the dataset raises for wrong settings."""
        _, config = self._factory.DATASETS[name]
        made = config(**self._settings.get(name, {}), seed=0, size=SIZE)
        if hasattr(made, "validate"):
            made.validate()

    def entry(self, name: str, seed: int, index: int) -> dict[str, Any]:
        """One entry. It depends on the arguments alone."""
        key = (name, seed, index)
        if key not in self._entries:
            dataset = self._dataset(name, seed)
            self._seed_globals(name, seed, index)  # some generators draw from these
            self._entries[key] = dataset[index]
        return self._entries[key]

    def score(self, name: str, seed: int, index: int, answer: str) -> float:
        """The score, from 0 to 1. An answer that the dataset cannot read scores 0."""
        entry = self.entry(name, seed, index)
        if name in _PARSED and not is_formula(answer):
            return 0.0
        dataset = self._dataset(name, seed)
        if name == "game_of_life_halting":  # its own score is 1 for any answer that is not empty
            return float(answer.strip().casefold() == str(entry["answer"]).casefold())
        try:
            score = float(dataset.score_answer(answer, entry))
        except Exception:  # noqa: BLE001 - some raise at an answer that is not of the expected form
            return 0.0
        return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0

    def do(self, request: dict[str, Any]) -> object:
        """Handles a request of the pool: `check`, `question` or `score`."""
        if request["do"] == "check":
            self.check(request["name"])
            return None
        task = request["name"], request["seed"], request["index"]
        if request["do"] == "score":
            return self.score(*task, request["answer"])
        entry = self.entry(*task)
        return {"question": str(entry["question"]), "answer": None if entry["answer"] is None else str(entry["answer"])}

    def _dataset(self, name: str, seed: int) -> Any:
        if (name, seed) not in self._made:
            self._seed_globals(name, seed, 0)
            settings = self._settings.get(name, {})
            self._made[name, seed] = self._factory.create_dataset(name, **settings, seed=seed, size=SIZE)
        return self._made[name, seed]

    def _seed_globals(self, name: str, seed: int, index: int) -> None:
        random.seed(f"{name}/{seed}/{index}")
        self._numpy.random.seed((seed + index) % 2**32)


def is_formula(answer: str) -> bool:
    """Whether the text has only numbers, operators, one-letter variables and names of functions."""
    if not _FORMULA.fullmatch(answer) or "_" in answer:
        return False
    return all(len(name) == 1 or name in _FORMULA_NAMES for name in _NAME.findall(_EXPONENT.sub("", answer)))


def main() -> None:
    seconds = int(sys.argv[1])
    memory = int(sys.argv[2])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what a dataset prints is no answer
    signal.alarm(_LOAD_SECONDS)  # whose default action ends the process, whatever it is doing
    datasets = Datasets(json.loads(sys.stdin.readline()))
    _answer(answers, lambda: None)
    for line in sys.stdin:
        signal.alarm(seconds)
        request = json.loads(line)
        _answer(answers, lambda: datasets.do(request))  # noqa: B023 - called at once


def _answer(answers: TextIO, call: Callable[[], object]) -> None:
    try:
        answer = {"ok": call()}
    except Exception as error:  # noqa: BLE001 - told to whoever asked
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    signal.alarm(0)
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
