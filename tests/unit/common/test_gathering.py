"""What is put at about the same time goes together, and whoever is alone does not wait."""

from __future__ import annotations

import asyncio

from mulligan.common.gathering import Gathering
from tests.support.virtual_time import run_in_virtual_time

LONG = 3600.0


class Sent:
    """Gathers numbers, and has what was sent."""

    def __init__(self, seconds: float = LONG, most: int = 100):
        self.batches: list[list[int]] = []
        self.gathering = Gathering(self.batches.append, seconds, most)

    def put(self, *numbers: int) -> None:
        for number in numbers:
            self.gathering.put(number)


async def ticks() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_one_alone_goes_at_the_end_of_its_tick_and_those_of_one_tick_go_together() -> None:
    sent = Sent()
    sent.put(1)
    assert sent.batches == []
    await ticks()
    sent.put(2, 3)
    await ticks()
    assert sent.batches == [[1], [2, 3]]


async def test_while_a_call_is_under_way_others_wait_for_its_end() -> None:
    sent = Sent()
    with sent.gathering.under_way():
        with sent.gathering.under_way():
            sent.put(1)
            await ticks()
            sent.put(2)
            await ticks()
        await ticks()
        assert sent.batches == []
    await ticks()
    assert sent.batches == [[1, 2]]


def test_nobody_waits_for_longer_than_the_time_that_is_set() -> None:
    async def gathered() -> None:
        sent = Sent(seconds=10.0)
        with sent.gathering.under_way():
            sent.put(1)
            await asyncio.sleep(6.0)
            sent.put(2)
            await asyncio.sleep(3.0)
            assert sent.batches == []
            await asyncio.sleep(2.0)
            assert sent.batches == [[1, 2]]
            sent.put(3)
            await asyncio.sleep(9.0)
            assert sent.batches == [[1, 2]], "the time begins anew"
            await asyncio.sleep(2.0)
            assert sent.batches == [[1, 2], [3]]

    run_in_virtual_time(gathered())


async def test_as_many_as_a_call_takes_do_not_wait() -> None:
    sent = Sent(most=2)
    with sent.gathering.under_way():
        sent.put(1)
        await ticks()
        sent.put(2)
        await ticks()
        assert sent.batches == [[1, 2]]


async def test_what_waits_at_the_end_is_given_back() -> None:
    sent = Sent(seconds=0.001)
    with sent.gathering.under_way():
        sent.put(1, 2)
        await ticks()
        assert sent.gathering.close() == [1, 2]
    await asyncio.sleep(0.005)
    assert sent.batches == []
