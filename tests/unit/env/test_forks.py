"""Forks in the episode table: what a copy is, what is refused, and what a fork that fails leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.types import EpisodeStep, Outcome
from mulligan.env.base import Environment
from mulligan.env.episodes import EpisodeLimits, EpisodeTable, StepRequest
from mulligan.env.workers import WorkerPool
from mulligan.testing.chained import Chain, Chained, ChainedSettings

LEASE = 100.0
TIMEOUT = 0.5


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def workers() -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(size=4, limit_seconds=60.0, max_abandoned=8)
    yield pool
    pool.close()


@pytest.fixture
def chained() -> Chained:
    return Chained("chained", ChainedSettings())


@pytest.fixture
def table(workers: WorkerPool, chained: Chained) -> EpisodeTable:
    rigid = Chained("rigid", ChainedSettings(can_fork=False))
    environments: dict[str, Environment] = {"chained": chained, "rigid": rigid}
    return EpisodeTable(environments, workers, EpisodeLimits(max_episodes=4, lease_seconds=LEASE), Clock())


async def start(table: EpisodeTable, episode_id: str, task_id: str = "plain", environment: str = "chained") -> Chain:
    return Chain((await table.start(episode_id, environment, task_id)).observation)


async def step(table: EpisodeTable, episode_id: str, index: int, action: str) -> EpisodeStep:
    (answer,) = await table.step([StepRequest(episode_id, index, action)])
    if isinstance(answer, DomainError):
        raise answer
    assert answer is not None
    return answer


async def refused(table: EpisodeTable, episode_id: str, step_index: int, new_episode_id: str) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await table.fork(episode_id, step_index, new_episode_id)
    return caught.value


async def test_a_copy_has_the_past_and_a_future_of_its_own(table: EpisodeTable) -> None:
    chain = await start(table, "e")
    first = await step(table, "e", 0, "a")
    of_copy = Chain(f"nonce {chain.nonce}")
    assert first.observation == chain.after("a") == of_copy.after("a")
    begun = await table.fork("e", 1, "copy")
    assert begun.observation == first.observation
    assert (await step(table, "copy", 1, "b")).observation == of_copy.after("b")
    assert (await step(table, "e", 1, "c")).observation == chain.after("c")
    assert await step(table, "copy", 0, "a") == first
    with pytest.raises(DomainError) as caught:
        await step(table, "copy", 0, "another")
    assert caught.value.reason is Reason.STEP_CONFLICT
    table.end("e")
    assert (await step(table, "copy", 2, "d")).observation == of_copy.after("d")


async def test_a_repeated_fork_returns_the_first_answer(table: EpisodeTable) -> None:
    await start(table, "e")
    answers = await asyncio.gather(*(table.fork("e", 0, "copy") for _ in range(5)))
    assert len(set(answers)) == 1 and table.live_count == 2
    await step(table, "e", 0, "a")
    await step(table, "copy", 0, "b")
    assert await table.fork("e", 0, "copy") == answers[0]
    table.end("e")
    assert await table.fork("e", 0, "copy") == answers[0]


async def test_a_new_id_that_is_in_use_is_a_conflict(table: EpisodeTable) -> None:
    for episode_id in ("e", "other"):
        await start(table, episode_id)
    await table.fork("e", 0, "copy")
    await step(table, "e", 0, "a")
    for source, index, new in (("e", 1, "copy"), ("other", 0, "copy"), ("e", 1, "other"), ("e", 1, "e")):
        assert (await refused(table, source, index, new)).reason is Reason.EPISODE_CONFLICT
    with pytest.raises(DomainError, match="a fork of 'e' after 0 steps") as caught:
        await table.start("copy", "chained", "plain")
    assert caught.value.reason is Reason.EPISODE_CONFLICT


async def test_a_fork_is_of_the_present(table: EpisodeTable) -> None:
    await start(table, "e", "plain")
    await step(table, "e", 0, "a")
    skipped = await refused(table, "e", 2, "copy")
    assert (skipped.reason, skipped.metadata) == (Reason.STEP_SKIPPED, {"next_step_index": "1"})
    assert (await refused(table, "e", 0, "copy")).reason is Reason.STEP_CONFLICT
    assert (await refused(table, "nobody", 0, "copy")).reason is Reason.UNKNOWN_EPISODE
    for index in range(1, 8):
        await step(table, "e", index, "a")
    assert (await refused(table, "e", 8, "copy")).reason is Reason.EPISODE_FINISHED
    assert table.live_count == 0


async def test_an_expired_episode_has_no_copies(table: EpisodeTable) -> None:
    await start(table, "e")
    table._clock.now += LEASE + 1  # type: ignore[attr-defined]  # the test's clock
    assert (await refused(table, "e", 0, "copy")).reason is Reason.EPISODE_EXPIRED


async def test_an_environment_may_be_unable_to_fork(table: EpisodeTable) -> None:
    await start(table, "e", environment="rigid")
    assert (await refused(table, "e", 0, "copy")).reason is Reason.FORK_UNSUPPORTED
    await step(table, "e", 0, "a")


async def test_a_copy_takes_a_place(table: EpisodeTable) -> None:
    await start(table, "e")
    for number in range(3):
        await table.fork("e", 0, f"copy-{number}")
    full = await refused(table, "e", 0, "one-more")
    assert full.reason is Reason.CAPACITY_REACHED and full.retry_after is not None
    assert await table.fork("e", 0, "copy-0")  # repeated: takes no new place
    table.end("copy-1")
    await table.fork("e", 0, "one-more")


@pytest.mark.parametrize(
    ("task_id", "words"),
    [
        ("fork-raises", "RuntimeError, incident "),
        ("fork-is-itself", "the episode itself"),
        ("fork-is-nothing", "fork returned NoneType"),
    ],
)
async def test_a_fork_that_fails_leaves_the_episode_as_it_was(table: EpisodeTable, task_id: str, words: str) -> None:
    chain = await start(table, "e", task_id)
    failed = await refused(table, "e", 0, "copy")
    assert failed.reason is Reason.ENVIRONMENT_FAILED and words in failed.message
    assert table.live_count == 1
    assert (await step(table, "e", 0, "a")).observation == chain.after("a")
    await start(table, "copy")  # the id is free again


async def test_a_step_that_arrives_during_a_fork_comes_after_it(table: EpisodeTable, chained: Chained) -> None:
    chain = await start(table, "e", "fork-waits")
    of_copy = Chain(f"nonce {chain.nonce}")
    forking = [asyncio.create_task(table.fork("e", 0, f"copy-{number}")) for number in range(2)]
    await asyncio.sleep(0)
    stepping = asyncio.create_task(step(table, "e", 0, "a"))
    await asyncio.sleep(0)
    assert (await refused(table, "e", 0, "late")).reason is Reason.STEP_CONFLICT
    table._clock.now += LEASE + 1  # type: ignore[attr-defined]
    table.expire()
    assert table.live_count == 3  # busy ones don't expire
    chained.gate.set()
    await asyncio.gather(*forking)
    assert (await stepping).observation == chain.after("a")
    assert (await step(table, "copy-1", 0, "b")).observation == of_copy.after("b")


async def test_episodes_that_end_during_a_fork_are_closed_once(table: EpisodeTable, chained: Chained) -> None:
    await start(table, "e", "fork-waits")
    forking = asyncio.create_task(table.fork("e", 0, "copy"))
    await asyncio.sleep(0)
    table.end("e")
    table.end("copy")
    assert chained.closed == [] and table.live_count == 0
    chained.gate.set()
    await forking
    await table.close(5.0)
    assert len(chained.closed) == 2 and len(set(chained.closed)) == 2


async def test_after_a_fork_that_hangs_its_episode_plays_no_more(chained: Chained) -> None:
    pool = WorkerPool(size=2, limit_seconds=TIMEOUT, max_abandoned=8)
    hanging = Chained("chained", ChainedSettings(hang_seconds=4 * TIMEOUT))
    table = EpisodeTable({"chained": hanging}, pool)
    await start(table, "e", "fork-hangs")
    chain = await start(table, "neighbour")
    forking = asyncio.create_task(refused(table, "e", 0, "copy"))
    await asyncio.sleep(0)
    held = asyncio.create_task(step(table, "e", 0, "a"))
    failed = await forking
    assert failed.reason is Reason.ENVIRONMENT_FAILED and "not finished within 0.5 s" in failed.message
    answer = await held
    assert answer.outcome is Outcome.TIMEOUT and "has not returned" in answer.error
    assert (await step(table, "neighbour", 0, "a")).observation == chain.after("a")
    assert table.live_count == 1
    while len(hanging.closed) < 2:  # noqa: ASYNC110 - in the thread that was given up; the episode and its late copy
        await asyncio.sleep(0.01)
    pool.close()
