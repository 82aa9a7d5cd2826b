"""What the episodes of a table may keep in memory, whatever their callers send."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.types import EpisodeStep
from mulligan.env.base import EnvironmentInfo, PromptSet, Split, StepResult, TaskInfo
from mulligan.env.episodes import EpisodeLimits, EpisodeTable, StepRequest
from mulligan.env.workers import WorkerPool
from tests.support.waiting import until

LIMIT = 100_000
LARGE = "x" * 10_000


class Echoing:
    """It observes what was done. The action "end" ends it."""

    observation = "begin"

    def __init__(self, owner: Echo):
        self._owner = owner
        owner.open.add(self)

    def step(self, action: str) -> StepResult:
        self._owner.played += 1
        time.sleep(self._owner.seconds)
        return StepResult(action, action, done=action == "end", reward=0.0)

    def fork(self) -> Echoing:
        return Echoing(self._owner)

    def close(self) -> None:
        self._owner.may_close.wait(60)
        self._owner.open.discard(self)


class Echo:
    """`open` are the episodes that were not closed, `played` counts the steps of all. A call takes so many seconds."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.open: set[Echoing] = set()
        self.played = 0
        self.may_close = threading.Event()
        self.may_close.set()
        self.info = EnvironmentInfo("echo", "", PromptSet(*[""] * 8), 1000, 1.0, True, {Split.TEST: 1}, can_fork=True)

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        return []

    def start(self, task_id: str) -> Echoing:
        time.sleep(self.seconds)
        return Echoing(self)


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def workers() -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(size=4, limit_seconds=60.0, max_abandoned=8)
    yield pool
    pool.close()


@pytest.fixture
def table(workers: WorkerPool, echo: Echo) -> EpisodeTable:
    return EpisodeTable({"echo": echo}, workers, EpisodeLimits(max_episodes=20, max_bytes=LIMIT))


async def play(table: EpisodeTable, episode_id: str, *actions: str, begin: int = 0) -> EpisodeStep:
    answers = []
    for index, action in enumerate(actions, begin):
        (answer,) = await table.step([StepRequest(episode_id, index, action)])
        if isinstance(answer, DomainError):
            raise answer
        assert answer is not None
        answers.append(answer)
    return answers[-1]


async def refused(table: EpisodeTable, episode_id: str, index: int, action: str) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await play(table, episode_id, action, begin=index)
    return caught.value


async def test_finished_episodes_make_room(table: EpisodeTable) -> None:
    for n in range(40):
        await table.start(f"e{n}", "echo", "t")
        await play(table, f"e{n}", LARGE, "end")
        table.expire()
        assert table.answer_bytes <= LIMIT
    assert (await play(table, "e39", LARGE)).observation == LARGE, "the newest can be repeated"
    assert (await refused(table, "e0", 0, LARGE)).reason is Reason.EPISODE_EXPIRED


async def test_those_that_take_most_go_on_last(table: EpisodeTable) -> None:
    """Others still play, and no answer that was given is lost."""
    for name in ("large", "small"):
        await table.start(name, "echo", "t")
    played = 0
    error = None
    while error is None:
        try:
            await play(table, "large", LARGE, begin=played)
            played += 1
        except DomainError as refusal:
            error = refusal
    assert error.reason is Reason.CAPACITY_REACHED and error.retry_after is not None
    assert "answers_gib" in error.message
    assert LIMIT < table.answer_bytes < LIMIT + 3 * len(LARGE)
    assert (await refused(table, "small", 0, "x" * LIMIT)).reason is Reason.CAPACITY_REACHED, "an echo would take more"
    await play(table, "small", "a", "b", "end")
    for call in (table.start("another", "echo", "t"), table.fork("large", played, "copy")):
        with pytest.raises(DomainError) as caught:
            await call
        assert caught.value.reason is Reason.CAPACITY_REACHED and caught.value.retry_after is not None
    assert (await play(table, "large", *[LARGE] * played)).observation == LARGE
    table.end("large")
    await table.start("another", "echo", "t")


async def test_a_fork_counts_what_it_keeps_of_its_source(table: EpisodeTable) -> None:
    await table.start("e", "echo", "t")
    await play(table, "e", LARGE)
    alone = table.answer_bytes
    await table.fork("e", 1, "copy")
    assert table.answer_bytes == 2 * alone
    table.end("e")
    assert table.answer_bytes == alone > 2 * len(LARGE)
    table.end("copy")
    assert table.answer_bytes == 0


async def test_what_is_counted_is_what_is_kept(table: EpisodeTable) -> None:
    """After any calls; some callers have left before the answer."""
    rng = random.Random(0)

    async def call(name: str) -> None:
        match rng.randrange(3):
            case 0:
                await table.start(name, "echo", "t")
            case 1:
                await table.fork(name, rng.randrange(3), f"e{rng.randrange(8)}")
            case _:
                await play(table, name, rng.choice(["a", "end", LARGE]), begin=rng.randrange(4))

    for n in range(300):
        name = f"e{rng.randrange(8)}"
        if n % 5 == 0:
            table.end(name)
            continue
        task = asyncio.create_task(call(name))
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        if rng.random() < 0.3:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        held = {id(record): record for records in (table._live, table._finished) for record in records.values()}
        assert table.answer_bytes == sum(record.size for record in held.values())
    for n in range(8):
        table.end(f"e{n}")
    assert table.answer_bytes == table.live_count == 0


async def test_finished_episodes_that_still_close_stop_nobody(workers: WorkerPool, echo: Echo) -> None:
    """Though none may be kept."""
    table = EpisodeTable({"echo": echo}, workers, EpisodeLimits(max_finished=0))
    echo.may_close.clear()
    for n in range(3):
        await table.start(f"e{n}", "echo", "t")
        await play(table, f"e{n}", "end")
    assert len(table._finished) > 0
    echo.may_close.set()

    def gone() -> bool:
        table.expire()
        return not table._finished

    await until(gone)
    assert table.answer_bytes == 0
