"""The engine's queue, pauses and streams, over a real runner whose model is a table of logits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import SamplingParams, StopReason, VersionSpan
from mulligan.policy.backend import Sampled
from mulligan.policy.backends.transformers.attention import SlotAttention, SlotCache
from mulligan.policy.backends.transformers.engine import Engine
from mulligan.policy.backends.transformers.runner import Request, Runner
from tests.support.effort import examples

VOCABULARY = 20
END = 0
CAPACITY = 64
TABLE = torch.from_numpy(np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32))
TABLE[:, END] = -9  # rare, as in a model's answers


class Model:
    """The next token depends on the last. While `hold` is cleared no pass ends, which it is by itself after so many
    `passes`; `fault` is raised by the next one."""

    def __init__(self) -> None:
        self.hold = threading.Event()
        self.hold.set()
        self.passes = 0
        self.fault: Exception | None = None

    def __call__(
        self, ids_N: torch.Tensor, positions_N: torch.Tensor, last_R: torch.Tensor, attend: SlotAttention
    ) -> torch.Tensor:
        assert self.hold.wait(10)
        if self.passes:
            self.passes -= 1
            if not self.passes:
                self.hold.clear()
        if fault := self.fault:
            self.fault = None
            raise fault
        return TABLE[ids_N[last_R]]


@dataclass
class Running:
    engine: Engine
    runner: Runner
    model: Model

    async def ask(self, sampling: SamplingParams, priority: int = 0) -> Sampled:
        return await self.engine.generate(request(sampling), priority)

    async def stream(self, sampling: SamplingParams) -> list[Sampled]:
        return [part async for part in self.engine.stream(request(sampling))]


def request(sampling: SamplingParams) -> Request:
    return Request([5, 6, 7], sampling, sampling.seed or 0)


@asynccontextmanager
async def running(max_batch: int = 4, max_queue: int = 1000) -> AsyncIterator[Running]:
    cache = SlotCache({}, 4, CAPACITY, torch.float32, torch.device("cpu"))
    model = Model()
    text = lambda ids: "".join(chr(97 + token) for token in ids)  # noqa: E731
    runner = Runner(model, cache, torch.device("cpu"), [END], text, reuse_prefixes=True, tokens_per_pass=4096)
    engine = Engine(runner, max_batch=max_batch, max_queue=max_queue, batch_wait=0, prepare=lambda: None)
    try:
        yield Running(engine, runner, model)
    finally:
        model.hold.set()
        await engine.close()


async def soon(count: int = 3) -> None:
    """Lets tasks that were just created reach the engine's inbox."""
    for _ in range(count):
        await asyncio.sleep(0)


SHORT = SamplingParams(max_tokens=2)
PAUSE = None


@settings(max_examples=examples(60))
@given(wanted=st.lists(st.one_of(st.integers(-3, 3), st.just(PAUSE)), max_size=25), batch=st.sampled_from([1, 3]))
def test_greater_priority_goes_first_and_nothing_overtakes_a_pause(wanted: list[int | None], batch: int) -> None:
    """Among equals the first. What was asked before a pause has the version from before, what came later the next."""

    async def play() -> None:
        admitted: list[int] = []
        async with running(max_batch=batch) as it:
            admit = it.runner.admit

            def admitting(request: Request) -> None:
                admitted.append(request.seed)
                admit(request)

            it.runner.admit = admitting  # type: ignore[method-assign]

            async def update() -> None:
                async with it.engine.paused():
                    it.runner.version += 1

            async with it.engine.paused():
                tasks: list[asyncio.Task[Sampled | None]] = []
                for index, priority in enumerate(wanted):
                    work = update() if priority is PAUSE else it.ask(replace(SHORT, seed=index), priority)
                    tasks.append(asyncio.create_task(work))
                await soon()
            answers = await asyncio.gather(*tasks)
        epochs = [sum(before is PAUSE for before in wanted[:index]) for index in range(len(wanted))]
        asked = [index for index, priority in enumerate(wanted) if priority is not PAUSE]
        assert admitted == sorted(asked, key=lambda index: (epochs[index], -(wanted[index] or 0)))
        for index in asked:
            sampled = answers[index]
            assert sampled is not None
            assert sampled.policy_versions == (VersionSpan(epochs[index], len(sampled.token_ids)),)

    asyncio.run(play())


def joined(parts: Sequence[Sampled]) -> Sampled:
    assert all(part.stop_reason is None and part.token_ids for part in parts[:-1])
    tokens = tuple(token for part in parts for token in part.token_ids)
    log_probs = tuple(value for part in parts for value in part.log_probs)
    assert sum(span.token_count for part in parts for span in part.policy_versions) == len(tokens)
    versions = (VersionSpan(parts[0].policy_versions[0].policy_version, len(tokens)),)
    return Sampled(tokens, log_probs, parts[-1].stop_reason, versions)


samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 3.0]),
    top_k=st.sampled_from([0, 5]),
    max_tokens=st.sampled_from([1, 2, 3, 7, 12, 20, 80]),  # those in between add nothing; the last is out of reach
    seed=st.integers(0, 2**40),
    stop=st.sampled_from([(), ("c",), ("ab", "de")]),
    stop_token_ids=st.sampled_from([(), (3,), (4, 9)]),
)


@settings(max_examples=examples(60))
@given(wanted=st.lists(samplings, min_size=1, max_size=6))
def test_the_parts_of_a_stream_are_the_answer_without_one(wanted: list[SamplingParams]) -> None:
    async def play() -> None:
        async with running() as it:
            whole = [await it.ask(sampling) for sampling in wanted]
            parts = await asyncio.gather(*map(it.stream, wanted))
            together = await asyncio.gather(*map(it.ask, wanted))
        assert [joined(one) for one in parts] == whole == together

    asyncio.run(play())


async def test_parts_come_while_the_answer_is_sampled() -> None:
    """A reader that is slow gets what has come meanwhile at once."""
    async with running() as it:
        it.model.passes = 1
        stream = it.engine.stream(request(SamplingParams(max_tokens=50, temperature=0.0)))
        first = await anext(stream)
        assert (first.stop_reason, len(first.token_ids)) == (None, 1)
        it.model.hold.set()
        async with it.engine.paused():
            rest = [part async for part in stream]
        assert [len(part.token_ids) for part in rest] == [49]


async def test_who_stops_reading_frees_the_place() -> None:
    endless = SamplingParams(max_tokens=CAPACITY, temperature=0.0)
    async with running(max_batch=1) as it:
        it.model.hold.clear()
        stream = it.engine.stream(request(endless))
        reading = asyncio.ensure_future(anext(stream))
        waiting = asyncio.create_task(it.ask(SHORT))
        unary = asyncio.create_task(it.ask(endless))
        await soon()
        unary.cancel()
        reading.cancel()
        await asyncio.gather(reading, unary, return_exceptions=True)
        await stream.aclose()
        assert it.engine.pending == 1
        it.model.hold.set()
        assert len((await waiting).token_ids) == 2
        assert (it.engine.pending, it.runner.running) == (0, 0)

        stream = it.engine.stream(request(endless))
        await anext(stream)
        await stream.aclose()
        assert it.engine.pending == 0
        await it.ask(SHORT)  # one place alone: it is free
        await it.engine.urgently(iter(()))
        assert it.runner.running == 0


@pytest.mark.parametrize(
    ("params", "count", "reason"),
    [
        ({}, 12, StopReason.MAX_TOKENS),
        ({"max_tokens": 1000}, CAPACITY - 3, StopReason.CONTEXT_FULL),
        ({"stop_token_ids": "last"}, 12, StopReason.STOP_TOKEN),
        ({"stop_token_ids": "last", "max_tokens": 1000}, 12, StopReason.STOP_TOKEN),
        ({"stop": "last"}, 12, StopReason.STOP_STRING),
        ({"stop_token_ids": "last", "stop": "last"}, 12, StopReason.STOP_TOKEN),
        ({"stop_token_ids": (END,)}, 12, StopReason.MAX_TOKENS),
    ],
)
async def test_why_a_completion_ends(params: dict[str, object], count: int, reason: StopReason) -> None:
    """A seed whose twelfth token is the first of its kind; "last" stands for it."""
    plain = SamplingParams(max_tokens=12, temperature=3.0)
    async with running() as it:
        seeds = iter(range(10_000))
        while True:
            sampled = (await it.ask(plain := replace(plain, seed=next(seeds)))).token_ids
            longer = (await it.ask(replace(plain, max_tokens=1000))).token_ids
            if sampled[-1] not in (*sampled[:-1], END) and END not in longer:
                break
        last = {
            "stop_token_ids": (19, sampled[-1]) if 19 not in sampled else (sampled[-1],),
            "stop": (chr(97 + sampled[-1]),),
        }
        chosen = {name: last[name] if value == "last" else value for name, value in params.items()}
        found = await it.ask(replace(plain, **chosen))  # type: ignore[arg-type]
        assert (found.stop_reason, len(found.token_ids)) == (reason, count)
        assert found.token_ids[:12] == sampled


async def test_the_end_of_the_turn_is_that_also_when_it_is_a_stop_token() -> None:
    async with running() as it:
        for seed in range(10_000):
            sampling = SamplingParams(max_tokens=60, temperature=5.0, seed=seed, stop_token_ids=(END,), stop=("a",))
            found = await it.ask(sampling)
            if END in found.token_ids:
                break
        assert found.stop_reason is StopReason.END_OF_TURN
        assert found.token_ids.index(END) == len(found.token_ids) - 1


async def test_a_full_queue_refuses_but_not_what_is_urgent() -> None:
    async with running(max_batch=1, max_queue=1) as it:
        async with it.engine.paused():
            tasks = [asyncio.create_task(it.ask(SHORT)) for _ in range(2)]
            await soon()
            for refused in (it.ask(SHORT), it.stream(SHORT), it.engine.in_steps(iter([1]))):
                with pytest.raises(DomainError) as caught:
                    await refused
                assert caught.value.reason is Reason.QUEUE_FULL and caught.value.retry_after
            assert await it.engine.urgently(iter([1, 2])) == [1, 2]
            assert not any(task.done() for task in tasks)
        await asyncio.gather(*tasks)
        assert it.engine.pending == 0


async def test_a_pause_begins_when_all_before_it_has_finished_and_one_that_is_given_up_delays_nobody() -> None:
    async with running() as it:
        it.model.hold.clear()
        before = asyncio.create_task(it.ask(SHORT))
        scoring = asyncio.create_task(it.engine.in_steps(iter([1, 2, 3])))
        order: list[str] = []

        async def pause(name: str) -> None:
            async with it.engine.paused():
                assert it.runner.running == 0 and before.done() and scoring.done()
                order.append(name)

        await soon()
        first = asyncio.create_task(pause("first"))
        given_up = asyncio.create_task(pause("given up"))
        await soon()
        after = asyncio.create_task(it.ask(SHORT))
        await soon()
        given_up.cancel()
        it.model.hold.set()
        await asyncio.gather(first, after)
        assert order == ["first"]


async def test_steps_that_fail_and_passes_that_fail_end_with_their_error_alone() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("planned")

    async with running() as it:
        for run in (it.engine.in_steps, it.engine.urgently):
            with pytest.raises(ValueError, match="planned"):
                await run(failing())
        it.model.fault = RuntimeError("out of memory")
        results = await asyncio.gather(it.ask(SHORT), it.stream(SHORT), return_exceptions=True)
        assert any(isinstance(result, RuntimeError) for result in results)
        assert it.runner.running == 0 and it.engine.pending == 0
        assert len((await it.ask(SHORT)).token_ids) == 2


async def test_closing_fails_what_runs_waits_or_comes_later() -> None:
    async with running(max_batch=1) as it:
        it.model.hold.clear()
        tasks: list[asyncio.Task[object]] = [asyncio.create_task(it.ask(SHORT)), asyncio.create_task(it.stream(SHORT))]
        tasks.append(asyncio.create_task(it.engine.in_steps(iter([1]))))
        pausing = it.engine.paused()
        tasks.append(asyncio.create_task(pausing.__aenter__()))
        await soon()
        closing = asyncio.create_task(it.engine.close())
        await soon()
        it.model.hold.set()
        await closing
        for work in (*tasks, it.ask(SHORT), it.stream(SHORT), it.engine.urgently(iter([1]))):
            with pytest.raises(DomainError) as caught:
                await work
            assert caught.value.reason is Reason.ENGINE_UNAVAILABLE
