"""Tasks that are run, ended and woken together."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Coroutine, Iterator
from itertools import pairwise
from typing import Any

import pytest

from mulligan.common.tasks import (
    Broadcast,
    LoopThread,
    PrioritySlots,
    TimeLimit,
    TooLong,
    cancel,
    gather_in_turn,
    gather_or_cancel,
    to_its_end,
)


class Failed(Exception):
    pass


async def returned(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def failing() -> int:
    await asyncio.sleep(0)
    raise Failed


async def test_results_come_in_order() -> None:
    assert await gather_or_cancel(returned(value) for value in (3, 1, 2)) == [3, 1, 2]
    assert await gather_or_cancel([]) == []


async def test_the_first_failure_ends_the_others_before_it_is_raised() -> None:
    ended = []

    async def endless() -> int:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)
        return 0

    with pytest.raises(Failed):
        await gather_or_cancel([endless(), failing(), endless()])
    assert ended == [True, True]


async def test_a_failure_keeps_its_cause() -> None:
    cause = ValueError("why")

    async def explained() -> int:
        raise Failed from cause

    with pytest.raises(Failed) as failure:
        await gather_or_cancel([explained()])
    assert failure.value.__cause__ is cause and failure.value.__context__ is None


async def test_who_is_cancelled_ends_its_calls() -> None:
    started = asyncio.Event()
    ended = []

    async def endless() -> int:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)
        return 0

    caller = asyncio.create_task(gather_or_cancel([endless(), endless()]))
    await started.wait()
    await asyncio.sleep(0)
    await cancel(caller)
    assert caller.cancelled() and ended == [True, True]


async def test_who_is_cancelled_is_cancelled_although_a_call_fails_at_its_end() -> None:
    started = asyncio.Event()

    async def fails_at_its_end() -> int:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise Failed from None
        return 0

    caller = asyncio.create_task(gather_or_cancel([fails_at_its_end(), fails_at_its_end()]))
    await started.wait()
    await cancel(caller)
    assert caller.cancelled()


async def test_others_have_their_turn_while_many_tasks_are_made() -> None:
    made = 0
    seen = []

    def many() -> Iterator[Coroutine[Any, Any, int]]:
        nonlocal made
        for made in range(1, 1001):
            yield returned(made)

    async def another() -> None:
        while made < 1000:
            seen.append(made)
            await asyncio.sleep(0)

    beside = asyncio.create_task(another())
    assert await gather_or_cancel(many()) == list(range(1, 1001))
    await beside
    assert max(two - one for one, two in pairwise(seen)) <= 100


async def test_who_is_cancelled_while_tasks_are_made_makes_no_more() -> None:
    ran = []

    async def noted(value: int) -> int:
        ran.append(value)
        return value

    coroutines = [noted(value) for value in range(1000)]
    caller = asyncio.create_task(gather_or_cancel(coroutines))
    await asyncio.sleep(0)
    await cancel(caller)
    assert caller.cancelled() and len(ran) <= 200
    assert {inspect.getcoroutinestate(one) for one in coroutines} == {inspect.CORO_CLOSED}


@pytest.mark.parametrize("at_once", [1, 3, 10_000])
async def test_in_turn_each_is_made_when_it_can_begin(at_once: int) -> None:
    made: list[int] = []
    ended: list[int] = []
    most = 0

    async def one(value: int) -> int:
        nonlocal most
        most = max(most, len(made) - len(ended))
        for _ in range(value % 3):
            await asyncio.sleep(0)
        ended.append(value)
        return value

    def all_of() -> Iterator[Coroutine[Any, Any, int]]:
        for value in range(50):
            made.append(value)
            yield one(value)

    assert await gather_in_turn(all_of(), at_once) == list(range(50)) == made
    assert most <= at_once and (most == at_once or at_once > 50)
    assert await gather_in_turn(iter(()), at_once) == []


async def test_in_turn_the_first_failure_ends_the_others_and_begins_no_more() -> None:
    begun = []
    ended = []

    async def one(value: int) -> int:
        begun.append(value)
        try:
            await (failing() if value == 2 else asyncio.Event().wait())
        finally:
            ended.append(value)
        return value

    with pytest.raises(Failed):
        await gather_in_turn((one(value) for value in range(10)), 4)
    assert begun == [0, 1, 2, 3] and sorted(ended) == begun


async def test_a_failure_leaves_no_cancellation_behind() -> None:
    """With one, a timeout around it would cancel its task."""
    with pytest.raises(Failed):
        await gather_or_cancel([failing()])
    caller = asyncio.current_task()
    assert caller is not None and caller.cancelling() == 0


async def test_cancel_waits_and_ignores_what_is_over_or_none() -> None:
    over = asyncio.create_task(failing())
    await asyncio.wait([over])
    running = asyncio.create_task(returned(1))
    await cancel(over, None, running)
    assert running.cancelled() and isinstance(over.exception(), Failed)


async def test_a_broadcast_wakes_those_that_wait_and_no_later_ones() -> None:
    changed = Broadcast()
    waiting = [asyncio.create_task(changed.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    changed.wake_all()
    late = asyncio.create_task(changed.wait())
    await asyncio.gather(*waiting)
    assert not late.done()
    changed.wake_all()
    await late


def test_tasks_of_a_loop_in_a_thread_go_on_while_nobody_waits_for_them() -> None:
    thread = LoopThread("test")
    done = threading.Event()

    async def later() -> None:
        await asyncio.sleep(0)
        done.set()

    thread.later(later())
    assert done.wait(300)
    assert thread.run(returned(3)) == 3
    with pytest.raises(Failed):
        thread.run(failing())
    thread.close()


def test_a_coroutine_that_is_not_waited_for_any_longer_is_cancelled() -> None:
    thread = LoopThread("test")
    cancelled = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(TimeoutError):
        thread.run(endless(), 0.01)
    assert cancelled.wait(300)
    thread.close()


async def test_a_free_slot_goes_to_the_least_priority_and_among_equals_to_the_first() -> None:
    slots = PrioritySlots(2)
    order: list[str] = []
    leave = asyncio.Event()

    async def holds(name: str, priority: int) -> None:
        async with slots.held(priority):
            order.append(name)
            await leave.wait()

    tasks = []
    for name, priority in (("a", 5), ("b", 5), ("c", 2), ("d", 1), ("e", 2), ("f", 1)):
        tasks.append(asyncio.create_task(holds(name, priority)))
        await asyncio.sleep(0)
    assert order == ["a", "b"], "who holds a slot keeps it"
    leave.set()
    await asyncio.gather(*tasks)
    assert order == ["a", "b", "d", "f", "c", "e"]


async def test_a_slot_that_was_given_to_who_is_cancelled_is_not_lost() -> None:
    """Before it was given, and between that and the next turn of the loop."""
    slots = PrioritySlots(1)
    await slots.acquire()
    early, late, last = (asyncio.create_task(slots.acquire(number)) for number in range(3))
    await asyncio.sleep(0)
    early.cancel()
    slots.release()  # for `late`
    late.cancel()
    await last
    assert early.cancelled() and late.cancelled()
    slots.release()
    await asyncio.wait_for(slots.acquire(), 1)
    waiting = asyncio.create_task(slots.acquire())
    await asyncio.sleep(0)
    assert not waiting.done(), "there is one slot, not two"
    await cancel(waiting)


async def test_a_time_limit_ends_long_waits_alone() -> None:
    limit = TimeLimit(0.1)

    async def waits(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    done = await asyncio.gather(
        *(limit.within(waits(seconds)) for seconds in (0.0, 30.0, 0.0, 30.0)), return_exceptions=True
    )
    assert [type(one) for one in done] == [float, TooLong, float, TooLong]
    assert await limit.within(waits(0.0)) == 0.0
    with pytest.raises(TooLong, match=r"longer than 0\.1 s"):
        await limit.within(waits(30.0))


async def test_a_time_limit_is_not_taken_for_a_cancellation_nor_the_reverse() -> None:
    inner, outer = TimeLimit(30.0), TimeLimit(0.05)
    with pytest.raises(TooLong, match=r"longer than 0\.05 s"):
        await outer.within(inner.within(asyncio.sleep(30)))
    task = asyncio.create_task(inner.within(asyncio.sleep(30)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(TimeoutError, match="of the wait itself"):
        await inner.within(_fails())


async def _fails() -> None:
    raise TimeoutError("of the wait itself")


async def test_work_that_ends_though_its_caller_is_cancelled() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    ended = []

    async def work() -> None:
        begun.set()
        await go_on.wait()
        ended.append(True)
        raise Failed

    caller = asyncio.create_task(to_its_end(work()))
    await begun.wait()
    caller.cancel()
    await asyncio.sleep(0)
    assert not caller.done(), "it waits for the end"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended == [True]
    assert await to_its_end(returned(3)) == 3
    with pytest.raises(Failed):
        await to_its_end(failing())
