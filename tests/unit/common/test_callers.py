from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from mulligan.common.callers import CallerLimits, Callers, Visit, by_address, by_certificate, by_token
from mulligan.common.errors import DomainError, Reason


@pytest.mark.parametrize(
    ("peer", "key"),
    [
        ("ipv4:127.0.0.1:4711", "address 127.0.0.1"),
        ("ipv6:%5B::1%5D:4711", "address ::/64"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4711", "address 2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:4711", "address fe80::/64"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:4711", "address 10.0.0.1"),
        ("ipv6:nonsense:4711", "address nonsense"),
        ("unix:/tmp/mulligan/trainer", "unix"),
        ("", ""),
    ],
)
def test_the_key_of_an_address(peer: str, key: str) -> None:
    assert by_address(peer) == key


def test_the_key_of_a_credential_tells_nothing_about_it() -> None:
    assert by_token("Bearer a-token-of-mine") != by_token("Bearer a-token-of-another")
    assert "mine" not in by_token("Bearer a-token-of-mine") and len(by_token("x" * 10_000)) < 30
    assert by_certificate(b"one") != by_certificate(b"another") and len(by_certificate(b"one")) < 30


def test_each_caller_has_limits_of_its_own_and_is_forgotten_at_its_last_call() -> None:
    callers = Callers(CallerLimits(calls=2, streams=1, held_bytes=100))
    first, second = Visit(callers, "a", False), Visit(callers, "a", True)
    with pytest.raises(DomainError) as caught:
        Visit(callers, "a", False)
    assert caught.value.reason is Reason.CALLER_LIMIT and caught.value.metadata == {"limit": "calls"}
    first.end()
    with pytest.raises(DomainError) as caught:
        Visit(callers, "a", True)
    assert caught.value.metadata == {"limit": "streams"}
    second.hold(100)
    with pytest.raises(DomainError) as caught:
        Visit(callers, "a", False)
    assert caught.value.metadata == {"limit": "bytes"}
    other = Visit(callers, "b", True)
    assert len(callers) == 2
    second.end()
    other.end()
    assert len(callers) == 0
    Visit(callers, "a", True).end()


async def test_callers_take_turns_and_this_machine_waits_for_none() -> None:
    callers = Callers(CallerLimits(calls_of_all=3, receiving_of_all=1))
    never, read = asyncio.Event(), []

    async def receive(key: str, until: asyncio.Event | None = None) -> None:
        visit = Visit(callers, key, False)
        try:
            await visit.receive(until.wait if until else _nothing)
            read.append(key)
        finally:
            visit.end()

    held = asyncio.create_task(receive("address 10.0.0.1", never))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(receive(f"address 10.0.0.{number}")) for number in (2, 3)]
    await asyncio.sleep(0)
    for key in ("address 127.0.0.1", "address ::/64", "unix"):
        await receive(key)
    assert read == ["address 127.0.0.1", "address ::/64", "unix"]
    with pytest.raises(DomainError) as caught:
        await receive("address 10.0.0.4")
    assert caught.value.metadata == {"limit": "calls_of_all"}
    never.set()
    await asyncio.gather(held, *waiting)
    assert read[3:] == ["address 10.0.0.1", "address 10.0.0.2", "address 10.0.0.3"]
    await receive("address 10.0.0.4")
    assert callers.calls == 0


async def _nothing() -> None:
    pass


def test_any_number_of_callers_takes_a_bounded_table() -> None:
    callers = Callers(CallerLimits(calls_per_second=0.001))
    held = Visit(callers, "held", False)
    for number in range(6_000):
        Visit(callers, str(number), False).end()
    assert len(callers) <= 4_100
    with pytest.raises(DomainError, match="it calls too often"):
        Visit(callers, "5999", False)
    with pytest.raises(DomainError, match="it calls too often"):
        Visit(callers, "held", False)
    held.end()


async def test_a_caller_waits_for_its_turn_to_be_received_and_others_do_not() -> None:
    callers = Callers(CallerLimits(receiving=1, receive_seconds=60))
    arrives = asyncio.Event()

    async def slow() -> str:
        await arrives.wait()
        return "slow"

    async def fast() -> str:
        return "fast"

    first = asyncio.create_task(Visit(callers, "a", False).receive(slow))
    await asyncio.sleep(0)
    second = asyncio.create_task(Visit(callers, "a", False).receive(fast))
    assert await Visit(callers, "b", False).receive(fast) == "fast"
    assert not second.done()
    arrives.set()
    assert await first == "slow" and await second == "fast"


async def test_a_message_that_does_not_arrive_gives_its_place_away() -> None:
    callers = Callers(CallerLimits(receiving=1, receive_seconds=0.05, idle_seconds=0.05))

    async def never() -> str:
        await asyncio.Event().wait()
        return ""

    async def stream() -> AsyncIterator[int]:
        yield 1
        await asyncio.Event().wait()

    for _ in range(2):
        with pytest.raises(DomainError, match=r"did not arrive within 0\.05 s") as caught:
            await Visit(callers, "a", False).receive(never)
        assert caught.value.metadata == {"limit": "receive_seconds"}
    messages = Visit(callers, "a", True).receive_stream(stream())
    assert await anext(messages) == 1
    with pytest.raises(DomainError, match=r"no request arrived for 0\.05 s"):
        await anext(messages)


def test_calls_of_all_callers_together_have_a_limit_and_those_refused_are_not_remembered() -> None:
    callers = Callers(CallerLimits(calls=2, calls_of_all=3))
    visits = [Visit(callers, key, False) for key in ("a", "a", "b")]
    for key in ("c", "d", "b"):
        with pytest.raises(DomainError) as caught:
            Visit(callers, key, False)
        assert caught.value.metadata == {"limit": "calls_of_all"}
    assert len(callers) == 2
    visits.pop().end()
    assert len(callers) == 1
    for visit in (*visits, Visit(callers, "c", False)):
        visit.end()
    assert len(callers) == callers.calls == 0
