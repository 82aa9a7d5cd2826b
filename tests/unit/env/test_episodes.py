"""The episode table and its threads, in one process, with a clock that the test turns."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from functools import partial

import pytest

from mulligan.common.callers import current_caller
from mulligan.common.errors import DomainError, Reason
from mulligan.common.types import EpisodeStep, Outcome
from mulligan.env.calls import StartResult
from mulligan.env.episodes import EpisodeLimits, EpisodeTable, StartRequest, StepRequest
from mulligan.env.workers import FunctionJob, TimedOut, WorkerPool
from tests.support.environments import MAX_STEPS, Awkward
from tests.support.waiting import until

LEASE = 100.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def workers() -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(size=4, limit_seconds=60.0, max_abandoned=2)
    yield pool
    pool.close()


@pytest.fixture
def awkward() -> Awkward:
    return Awkward("awkward", 0.3)


@pytest.fixture
def table(workers: WorkerPool, clock: Clock, awkward: Awkward) -> EpisodeTable:
    limits = EpisodeLimits(
        max_episodes=3, max_finished=2, max_remembered=4, lease_seconds=LEASE, remember_seconds=1000.0
    )
    return EpisodeTable({"awkward": awkward}, workers, limits, clock)


async def step(table: EpisodeTable, episode_id: str, index: int, action: str = "a") -> EpisodeStep:
    (answer,) = await table.step([StepRequest(episode_id, index, action)])
    if isinstance(answer, DomainError):
        raise answer
    assert answer is not None
    return answer


async def finish(table: EpisodeTable, episode_id: str) -> None:
    await table.start(episode_id, "awkward", "good")
    for index in range(MAX_STEPS):
        await step(table, episode_id, index)


async def reason_of(table: EpisodeTable, episode_id: str, index: int = 0) -> Reason:
    with pytest.raises(DomainError) as caught:
        await step(table, episode_id, index)
    return caught.value.reason


async def test_every_call_renews_the_lease(table: EpisodeTable, clock: Clock) -> None:
    await table.start("used", "awkward", "good")
    await table.start("idle", "awkward", "good")
    for index in range(MAX_STEPS - 1):
        clock.now += LEASE * 0.6
        await step(table, "used", index)
    assert await reason_of(table, "idle") is Reason.EPISODE_EXPIRED
    assert table.live_count == 1
    clock.now += LEASE
    assert (await step(table, "used", MAX_STEPS - 1)).done


async def test_expired_ids_are_remembered_for_a_while_and_not_without_end(table: EpisodeTable, clock: Clock) -> None:
    for n in range(3):
        await table.start(f"a{n}", "awkward", "good")
    clock.now += LEASE + 1
    for n in range(3):
        await table.start(f"b{n}", "awkward", "good")
    assert await reason_of(table, "a0") is Reason.EPISODE_EXPIRED
    clock.now += LEASE + 1
    assert await reason_of(table, "b0") is Reason.EPISODE_EXPIRED
    assert await reason_of(table, "a0") is Reason.UNKNOWN_EPISODE  # six ids, of which four are remembered
    clock.now += 1001
    assert await reason_of(table, "b0") is Reason.UNKNOWN_EPISODE


async def test_an_expired_id_may_be_started_anew(table: EpisodeTable, clock: Clock) -> None:
    await table.start("e", "awkward", "good")
    await step(table, "e", 0)
    clock.now += LEASE + 1
    assert await reason_of(table, "e", 1) is Reason.EPISODE_EXPIRED
    await table.start("e", "awkward", "good")
    assert (await step(table, "e", 0, "b")).observation == "1: b"


async def test_episodes_that_are_over_take_no_place_and_are_kept_in_bounds(table: EpisodeTable) -> None:
    for n in range(5):
        await finish(table, f"e{n}")
    assert table.live_count == 0
    assert (await step(table, "e4", 0)).observation == "1: a"
    assert (await step(table, "e3", 0)).observation == "1: a"
    assert await reason_of(table, "e2") is Reason.EPISODE_EXPIRED


async def test_capacity_is_refused_at_once_and_comes_back(table: EpisodeTable) -> None:
    for n in range(3):
        await table.start(f"e{n}", "awkward", "good")
    with pytest.raises(DomainError) as caught:
        await table.start("one-more", "awkward", "good")
    assert caught.value.reason is Reason.CAPACITY_REACHED
    assert caught.value.retry_after is not None
    assert (await table.start("e0", "awkward", "good")).observation == "begin"  # repeated: takes no new place
    table.end("e1")
    await table.start("one-more", "awkward", "good")


async def test_of_many_that_come_at_once_as_many_start_as_there_may_be(table: EpisodeTable) -> None:
    """Also of callers that leave at once."""
    starting = [asyncio.create_task(table.start(f"e{n}", "awkward", "good")) for n in range(20)]
    await asyncio.sleep(0)
    for task in starting[::2]:
        task.cancel()
    results = await asyncio.gather(*starting, return_exceptions=True)
    assert table.live_count == 3
    refused = [result for result in results if isinstance(result, DomainError)]
    assert {error.reason for error in refused} == {Reason.CAPACITY_REACHED}
    for n in range(3):
        table.end(f"e{n}")
    assert table.live_count == table.answer_bytes == 0


async def test_a_caller_has_a_share_of_the_live_episodes(workers: WorkerPool, clock: Clock, awkward: Awkward) -> None:
    table = EpisodeTable({"awkward": awkward}, workers, EpisodeLimits(max_episodes=4, max_caller_episodes=2), clock)
    current_caller.set("one")
    for name in ("a", "b"):
        await table.start(name, "awkward", "good")
    with pytest.raises(DomainError, match="2 episodes of this caller are live") as caught:
        await table.start("c", "awkward", "good")
    assert caught.value.reason is Reason.CAPACITY_REACHED and caught.value.retry_after is not None
    current_caller.set("another")
    await table.start("c", "awkward", "good")
    current_caller.set("one")
    table.end("a")
    await table.start("d", "awkward", "good")


def shown(answers: Sequence[StartResult | DomainError | None]) -> list[str | Reason | None]:
    """What the agent sees, or why nothing."""
    return [one if one is None else one.reason if isinstance(one, DomainError) else one.observation for one in answers]


async def test_of_many_starts_each_has_its_own_answer(table: EpisodeTable) -> None:
    await table.start("used", "awkward", "good")
    asked = [("used", "hangs"), ("a", "raises-at-start"), ("b", "unknown"), ("used", "good")]
    starts = [StartRequest(name, "awkward", task) for name, task in asked]
    expected = [Reason.EPISODE_CONFLICT, Reason.ENVIRONMENT_FAILED, Reason.UNKNOWN_TASK, "begin"]
    assert shown(await table.start_all(starts)) == expected
    assert table.live_count == 1
    assert shown(await table.start_all([StartRequest("c", "chess", "good")])) == [Reason.UNKNOWN_ENVIRONMENT]


async def test_of_many_starts_those_take_a_place_for_which_there_is_one(
    workers: WorkerPool, clock: Clock, awkward: Awkward
) -> None:
    table = EpisodeTable({"awkward": awkward}, workers, EpisodeLimits(max_episodes=4, max_caller_episodes=2), clock)
    starts = [StartRequest(name, "awkward", "good") for name in "abc"]
    current_caller.set("one")
    assert shown(await table.start_all(starts)) == ["begin", "begin", Reason.CAPACITY_REACHED]
    current_caller.set("another")
    others = [StartRequest(name, "awkward", "good") for name in "cdefa"]
    full = [Reason.CAPACITY_REACHED] * 2
    assert shown(await table.start_all(others)) == ["begin", "begin", *full, "begin"], "the last is there already"


async def test_a_slow_start_holds_up_no_other_and_goes_on(table: EpisodeTable) -> None:
    starts = [StartRequest(name, "awkward", task) for name, task in (("a", "good"), ("b", "hangs-at-start"))]
    assert shown(await table.start_all(starts, 0.0)) in ([None, None], ["begin", None])
    begun = await table.start("a", "awkward", "good")
    assert shown(await table.start_all(starts, 0.0)) == [begun.observation, None]
    waiting = asyncio.create_task(table.start_all(starts))
    await asyncio.sleep(0)
    waiting.cancel()
    assert len(await table.start_all(starts)) == 2, "a caller that leaves cancels nothing for others"


async def test_a_failed_start_gives_its_place_back(table: EpisodeTable) -> None:
    for n in range(10):
        with pytest.raises(DomainError):
            await table.start(f"e{n}", "awkward", "raises-at-start")
        with pytest.raises(DomainError):
            await table.start(f"e{n}", "awkward", "unknown")
    assert table.live_count == 0


async def test_a_running_step_keeps_its_episode(table: EpisodeTable, clock: Clock, awkward: Awkward) -> None:
    await table.start("e", "awkward", "waits")
    running = asyncio.create_task(step(table, "e", 0))
    await until(awkward.begun.is_set)
    clock.now += 10 * LEASE
    table.expire()
    awkward.go_on.set()
    assert (await running).observation == "1: a"
    assert (await step(table, "e", 0)).observation == "1: a"


async def test_a_caller_that_leaves_does_not_stop_the_step(table: EpisodeTable, awkward: Awkward) -> None:
    await table.start("e", "awkward", "waits")
    leaving = asyncio.create_task(step(table, "e", 0))
    await until(awkward.begun.is_set)
    leaving.cancel()
    again = asyncio.create_task(step(table, "e", 0))
    await asyncio.sleep(0)
    assert await reason_of(table, "e", 1) is Reason.STEP_SKIPPED
    with pytest.raises(DomainError) as caught:
        await step(table, "e", 0, "another")
    assert caught.value.reason is Reason.STEP_CONFLICT
    awkward.go_on.set()
    assert (await again).observation == "1: a"
    assert leaving.cancelled()


async def test_an_episode_ended_during_its_step_is_gone(table: EpisodeTable, awkward: Awkward) -> None:
    await table.start("e", "awkward", "waits")
    running = asyncio.create_task(step(table, "e", 0))
    await until(awkward.begun.is_set)
    table.end("e")
    awkward.go_on.set()
    assert (await running).observation == "1: a"
    assert await reason_of(table, "e") is Reason.UNKNOWN_EPISODE
    assert table.live_count == 0


async def test_hanging_threads_are_replaced_up_to_a_limit(clock: Clock) -> None:
    pool = WorkerPool(size=1, limit_seconds=0.5, max_abandoned=2)
    awkward = Awkward("awkward", 0)
    table = EpisodeTable({"awkward": awkward}, pool, EpisodeLimits(), clock)
    episodes = [f"e{n}" for n in range(5)]
    for episode_id in episodes:
        await table.start(episode_id, "awkward", "waits")
    answers = [await step(table, episode_id, 0) for episode_id in episodes]
    assert [answer.outcome for answer in answers] == [Outcome.TIMEOUT] * 5
    assert pool.exhausted
    assert "threads hang" in answers[-1].error
    with pytest.raises(DomainError, match="threads hang"):
        await table.start("another", "awkward", "good")
    awkward.go_on.set()
    await until(lambda: not pool.exhausted)
    assert (await table.start("another", "awkward", "good")).observation == "begin"
    pool.close()


async def test_the_event_loop_stays_free_while_environments_block(table: EpisodeTable, awkward: Awkward) -> None:
    await table.start("e", "awkward", "waits")
    running = asyncio.create_task(step(table, "e", 0))
    await until(awkward.begun.is_set)
    for _ in range(10):
        await asyncio.sleep(0.001)
        assert not running.done()
    awkward.go_on.set()
    assert (await running).observation == "1: a"


async def test_a_batch_runs_in_one_thread_when_it_is_fast(workers: WorkerPool) -> None:
    threads: list[object] = []
    workers.submit([FunctionJob(threading.get_ident, threads.append) for _ in range(20)])
    await workers.run(lambda: None)
    await until(lambda: len(threads) == 20)
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads


async def test_quick_calls_are_done_when_they_have_been_submitted(workers: WorkerPool) -> None:
    seen: asyncio.Queue[object] = asyncio.Queue()
    at_once = 0
    for n in range(200):
        before = seen.qsize()
        workers.submit([FunctionJob(partial(int, n), seen.put_nowait)])
        at_once += seen.qsize() > before
    results = [await seen.get() for _ in range(200)]  # on a busy machine some have not been by then
    assert sorted(results, key=repr) == sorted(range(200), key=repr)
    assert at_once > 0


async def test_slow_calls_are_not_waited_for(workers: WorkerPool) -> None:
    go_on = threading.Event()
    seen: asyncio.Queue[object] = asyncio.Queue()
    for _ in range(4):
        workers.submit([FunctionJob(partial(go_on.wait, 5.0), seen.put_nowait)])
    assert seen.empty()
    go_on.set()
    assert [await seen.get() for _ in range(4)] == [True] * 4


async def test_a_call_that_takes_too_long_raises_timed_out() -> None:
    pool = WorkerPool(size=1, limit_seconds=0.5, max_abandoned=1)
    go_on = threading.Event()
    with pytest.raises(TimedOut, match=r"0\.5 s"):
        await pool.run(lambda: go_on.wait(60))
    assert await pool.run(lambda: 7) == 7
    go_on.set()
    pool.close()
