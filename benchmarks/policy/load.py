"""Concurrent callers, and what they measure: tokens per second, latencies, time to the first token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.common import alternate, median

PROMPT_TOKENS = 96
NEW_TOKENS = 32
CALLERS = (1, 8, 64, 256)
STREAMING_CALLERS = (1, 64)
_LEAST_REQUESTS = 8  # of a round: a few callers make several requests each
_rng = np.random.default_rng(0)

# (prompt, number of tokens to sample) → number of sampled tokens
Generate = Callable[[list[int], int], Awaitable[int]]
# (prompt, number of tokens) → returns at the first token, with a function that reads the rest
FirstToken = Callable[[list[int], int], Awaitable[Callable[[], Awaitable[None]]]]


@dataclass(frozen=True, slots=True)
class EngineAccess:
    """A way to call an engine."""

    generate: Generate
    first_token: FirstToken


@dataclass(frozen=True, slots=True)
class Round:
    """`latencies` in seconds, one per request."""

    tokens_per_second: float
    latencies: tuple[float, ...]


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Random prompts, new at each call, so that no prefix is reused."""
    tokens: list[list[int]] = _rng.integers(0, vocabulary, (count, PROMPT_TOKENS)).tolist()
    return tokens


def turns_of(callers: int) -> int:
    return max(1, _LEAST_REQUESTS // callers)


async def ask(generate: Generate, vocabulary: int, least_turns: int, callers: int) -> Round:
    """Each caller makes at least `least_turns` requests, one after another."""

    async def call(asked: Sequence[list[int]]) -> tuple[int, list[float]]:
        tokens = 0
        latencies = []
        for prompt in asked:
            start = time.perf_counter()
            tokens += await generate(prompt, NEW_TOKENS)
            latencies.append(time.perf_counter() - start)
        return tokens, latencies

    turns = max(least_turns, turns_of(callers))
    asked = [prompts(turns, vocabulary) for _ in range(callers)]
    start = time.perf_counter()
    found = await asyncio.gather(*(call(mine) for mine in asked))
    seconds = time.perf_counter() - start
    return Round(sum(tokens for tokens, _ in found) / seconds, tuple(one for _, mine in found for one in mine))


async def ask_first(first_token: FirstToken, vocabulary: int, callers: int) -> list[float]:
    """Seconds to the first token of each request; all callers stream at the same time."""

    async def call(prompt: list[int]) -> float:
        start = time.perf_counter()
        rest = await first_token(prompt, NEW_TOKENS)
        seconds = time.perf_counter() - start
        await rest()
        return seconds

    found: list[float] = []
    for _ in range(turns_of(callers)):
        found += await asyncio.gather(*(call(prompt) for prompt in prompts(callers, vocabulary)))
    return found


async def added_latency(direct: Generate, service: Generate, vocabulary: int, pairs: int) -> tuple[float, float]:
    """The microseconds that the service adds to a single request, and to each further token.

    Computed from medians of direct calls and calls through the service, in turn, with one token and with NEW_TOKENS.
    """

    async def timed(generate: Generate, tokens: int) -> float:
        [prompt] = prompts(1, vocabulary)
        start = time.perf_counter()
        await generate(prompt, tokens)
        return time.perf_counter() - start

    added = {}
    for tokens in (1, NEW_TOKENS):
        found = await alternate(
            {"direct": lambda n=tokens: timed(direct, n), "service": lambda n=tokens: timed(service, n)},  # type: ignore[misc]
            pairs,
        )
        added[tokens] = (median(found["service"]) - median(found["direct"])) * 1e6
    return added[1], (added[NEW_TOKENS] - added[1]) / (NEW_TOKENS - 1)


def rounds_for(callers: int, rounds: int) -> int:
    """Fewer rounds for many callers: a round then takes long and has many requests."""
    return max(3, rounds // 2) if callers > 64 else rounds


async def throughput(
    ways: Mapping[str, Callable[[int], Awaitable[Round]]], rounds: int, numbers: Sequence[int] = CALLERS
) -> dict[tuple[str, int], list[Round]]:
    """The rounds of each way with each of the numbers of callers. The first round is warm-up and not counted."""
    found: dict[tuple[str, int], list[Round]] = {}
    for callers in numbers:
        measures = {name: (lambda way=way, n=callers: way(n)) for name, way in ways.items()}
        await alternate(measures, 1)
        for name, measured in (await alternate(measures, rounds_for(callers, rounds))).items():
            found[name, callers] = measured
    return found
