"""The measurements of an engine: throughput, added latency, streaming, updates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from benchmarks.common import alternate, median, percentile
from benchmarks.policy.load import (
    CALLERS,
    STREAMING_CALLERS,
    EngineAccess,
    Round,
    added_latency,
    ask,
    ask_first,
    prompts,
    throughput,
)
from benchmarks.policy.shapes import UpdateSeries
from benchmarks.policy.ways import SglangHttp
from mulligan.common.inference import CallOptions, PublishedWeights, SamplingParams
from mulligan.policy.client import PolicyClient

_STEADY_TURNS = 3
_LOAD_CALLERS = 8  # callers during an update of weights
_SETTLE_SECONDS = 0.5  # of that load, before an update begins


@dataclass
class EngineFigures:
    """The figures of one engine. The first of `ways` is the one that the others are compared with. `callers` are the
    numbers of callers."""

    ways: list[str]
    callers: Sequence[int] = CALLERS
    rounds: dict[tuple[str, int], list[Round]] = field(default_factory=dict)
    first_token: dict[tuple[str, int], list[float]] = field(default_factory=dict)  # seconds
    values: dict[str, float] = field(default_factory=dict)

    def rate(self, way: str, callers: int) -> float:
        return median([one.tokens_per_second for one in self.rounds[way, callers]])

    def ratio(self, way: str, callers: int) -> float:
        return self.rate(way, callers) / self.rate(self.ways[0], callers)

    def latency(self, way: str, callers: int, percent: float) -> float:
        return percentile([one for round_ in self.rounds[way, callers] for one in round_.latencies], percent)


async def measure(
    figures: EngineFigures,
    direct: EngineAccess,
    service: EngineAccess,
    others: Mapping[str, Callable[[int], Awaitable[Round]]],
    vocabulary: int,
    rounds: int,
) -> None:
    """Measures `others`, then `direct` and `service`. With `others`, which compute one batch at a time, each caller
    makes one request; without, several, for a steady load. With other numbers of callers than CALLERS, throughput is
    all that is measured."""
    least_turns = 1 if others else _STEADY_TURNS
    named = dict(zip(figures.ways[len(others) :], (direct, service), strict=True))
    ways = dict(others)
    for name, engine in named.items():
        ways[name] = partial(ask, engine.generate, vocabulary, least_turns)
    assert list(ways) == figures.ways
    figures.rounds = await throughput(ways, rounds, figures.callers)
    if figures.callers != CALLERS:
        return
    for callers in STREAMING_CALLERS:
        streams = {name: partial(ask_first, one.first_token, vocabulary, callers) for name, one in named.items()}
        await alternate(streams, 1)
        for name, found in (await alternate(streams, max(3, rounds // 2))).items():
            figures.first_token[name, callers] = [seconds for one in found for seconds in one]
    per_request, per_token = await added_latency(direct.generate, service.generate, vocabulary, 8 * rounds)
    figures.values |= {"added_us_per_request": round(per_request), "added_us_per_token": round(per_token, 1)}


async def measure_updates(
    figures: EngineFigures, client: PolicyClient, updates: UpdateSeries, vocabulary: int, count: int
) -> None:
    """Times updates, from the call to the first completion of the new version: alone and under load."""

    async def update(weights: PublishedWeights) -> float:
        [prompt] = prompts(1, vocabulary)
        start = time.perf_counter()
        difference = await client.update_weights(weights)
        options = CallOptions(min_policy_version=weights.policy_version)
        completion = await client.generate(prompt, SamplingParams(max_tokens=1), options)
        seconds = time.perf_counter() - start
        assert difference is not None and completion.policy_versions[0].policy_version == weights.policy_version
        return seconds

    async def sample(prompt: list[int]) -> None:
        await client.generate(prompt, SamplingParams(max_tokens=32))

    alone = [await update(await asyncio.to_thread(updates.following)) for _ in range(count)]
    under_load = []
    for _ in range(count):
        weights = await asyncio.to_thread(updates.following)
        async with _callers(sample, vocabulary):
            under_load.append(await update(weights))
    figures.values["update_to_serving_s"] = round(median(alone), 3)
    figures.values["update_to_serving_under_load_s"] = round(median(under_load), 3)


async def measure_own_updates(
    figures: EngineFigures,
    server: SglangHttp,
    updates: UpdateSeries,
    weights: Sequence[PublishedWeights],
    vocabulary: int,
) -> None:
    """Times the same with SGLang's own pause, update and continue, without any check."""

    async def update(one: PublishedWeights) -> float:
        folder = await asyncio.to_thread(updates.folder_of, one)
        [prompt] = prompts(1, vocabulary)
        label = f"bench-{one.policy_version}"
        start = time.perf_counter()
        await server.post("/pause_generation", mode="retract")
        body = {"model_path": str(folder), "weight_version": label, "flush_cache": True}
        loaded = await server.post("/update_weights_from_disk", **body)
        await server.post("/continue_generation")
        answer = await server.sample(prompt, 1)
        seconds = time.perf_counter() - start
        assert loaded["success"] and answer["meta_info"]["weight_version"] == label
        return seconds

    async def sample(prompt: list[int]) -> None:
        await server.sample(prompt, 32)

    half = len(weights) // 2
    alone = [await update(one) for one in weights[:half]]
    under_load = []
    for one in weights[half:]:
        async with _callers(sample, vocabulary):
            under_load.append(await update(one))
    figures.values["own_update_to_serving_s"] = round(median(alone), 3)
    figures.values["own_update_to_serving_under_load_s"] = round(median(under_load), 3)


@asynccontextmanager
async def _callers(sample: Callable[[list[int]], Awaitable[None]], vocabulary: int) -> AsyncIterator[None]:
    over = asyncio.Event()

    async def call() -> None:
        while not over.is_set():
            [prompt] = prompts(1, vocabulary)
            await sample(prompt)

    async with asyncio.TaskGroup() as group:
        for _ in range(_LOAD_CALLERS):
            group.create_task(call())
        await asyncio.sleep(_SETTLE_SECONDS)
        yield
        over.set()


def rows(figures: EngineFigures) -> list[list[str]]:
    """The rows of the table."""
    found = []
    for callers in figures.callers:
        for way in figures.ways:
            rates = [one.tokens_per_second for one in figures.rounds[way, callers]]
            first = figures.first_token.get((way, callers))
            found.append(
                [
                    f"{way}, {callers}",
                    f"{median(rates):,.0f}",
                    f"{min(rates):,.0f}–{max(rates):,.0f}",
                    f"{figures.ratio(way, callers):.2f}",
                    f"{figures.latency(way, callers, 50) * 1e3:,.0f}",
                    f"{figures.latency(way, callers, 99) * 1e3:,.0f}",
                    f"{median(first) * 1e3:,.0f}" if first else "",
                ]
            )
    return found
