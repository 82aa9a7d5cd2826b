"""Work beside the event loop, whose callers may leave."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from functools import partial

import pytest

from mulligan.common.work_threads import WorkThreads


class Held:
    """What a piece of work holds."""


class Gate:
    """Work that runs until it is let go."""

    def __init__(self) -> None:
        self.begun: list[Held] = []
        self.open = threading.Event()

    def pass_through(self, held: Held) -> str:
        self.begun.append(held)
        assert self.open.wait(60)
        return threading.current_thread().name


@pytest.fixture
def gate() -> Iterator[Gate]:
    found = Gate()
    yield found
    found.open.set()


async def until_begun(gate: Gate, count: int) -> None:
    async with asyncio.timeout(60):
        while len(gate.begun) < count:  # noqa: ASYNC110 - in another thread
            await asyncio.sleep(0.005)


async def test_so_many_run_at_once_and_the_others_follow(gate: Gate) -> None:
    threads = WorkThreads(2, "some")
    work = [asyncio.create_task(threads.run(partial(gate.pass_through, Held()))) for _ in range(5)]
    await until_begun(gate, 2)
    await asyncio.sleep(0.05)
    assert len(gate.begun) == 2 and not any(task.done() for task in work)
    gate.open.set()
    assert {name.rpartition("_")[0] for name in await asyncio.gather(*work)} == {"some"} and len(gate.begun) == 5


async def test_of_a_caller_that_leaves_nothing_is_kept(gate: Gate) -> None:
    threads = WorkThreads(1, "one")
    first = asyncio.create_task(threads.run(partial(gate.pass_through, Held())))
    await until_begun(gate, 1)
    held = Held()
    kept = weakref.ref(held)
    waiting = asyncio.create_task(threads.run(partial(gate.pass_through, held)))
    del held
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait((waiting,))
    assert waiting.cancelled()
    del waiting
    gc.collect()
    assert kept() is None and not first.done()
    gate.open.set()
    await first
    assert len(gate.begun) == 1


async def test_work_whose_caller_left_keeps_its_thread_until_it_ends(gate: Gate) -> None:
    threads = WorkThreads(1, "one")
    first = asyncio.create_task(threads.run(partial(gate.pass_through, Held())))
    await until_begun(gate, 1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(threads.run(partial(gate.pass_through, Held())))
    await asyncio.sleep(0.05)
    assert len(gate.begun) == 1
    gate.open.set()
    assert await second == "one_0"


def test_several_event_loops_and_errors(gate: Gate) -> None:
    threads = WorkThreads(1, "one")
    gate.open.set()

    def fail() -> None:
        raise LookupError("here")

    async def use() -> None:
        with pytest.raises(LookupError, match="here"):
            await threads.run(fail)
        work = (threads.run(partial(gate.pass_through, Held())) for _ in range(3))
        assert await asyncio.gather(*work) == ["one_0"] * 3

    asyncio.run(use())
    asyncio.run(use())
