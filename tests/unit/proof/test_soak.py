"""Whether growth is told from noise."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import threading
from contextlib import closing

import pytest

from proof.soak import BOUNDS, Samples, measure, slope, usage


def test_the_slope_is_the_median_of_all_pairs() -> None:
    assert slope([0, 1, 2, 4], [1, 3, 5, 9]) == 2.0
    assert slope([0, 1, 2], [0, 1, 100]) == 50.0  # of 1, 50 and 99
    assert slope([0, 1, 1, 2], [0, 1, 9, 2]) == 1.0  # two at one time have no slope between them


def samples(values: list[float], name: str = "memory_mib", every: float = 10.0) -> Samples:
    found = Samples()
    found.seconds = [number * every for number in range(len(values))]
    found.values = {other: [5.0] * len(values) for other in BOUNDS} | {name: values}
    return found


def test_noise_is_flat_and_so_is_what_grows_at_first() -> None:
    noise = random.Random(1)
    values = [300.0 + noise.uniform(-20, 20) for _ in range(150)]
    assert samples(values).judged(0.0)["memory_mib"]["flat"]
    begin = [100.0 + 5 * number for number in range(40)]
    rising = samples([*begin, *values])
    assert not rising.judged(0.0)["memory_mib"]["flat"]
    assert rising.judged(400.0)["memory_mib"]["flat"]


def test_a_few_high_samples_are_no_growth_and_a_leak_among_noise_is() -> None:
    noise = random.Random(2)
    values = [300.0 + noise.uniform(-3, 3) for _ in range(150)]
    spikes = [value + (500 if number > 120 and number % 5 == 0 else 0) for number, value in enumerate(values)]
    assert samples(spikes).judged(0.0)["memory_mib"]["flat"]
    leaking = [value + 0.08 * number for number, value in enumerate(values)]
    found = samples(leaking).judged(0.0)["memory_mib"]
    assert not found["flat"] and found["growth"] == pytest.approx(12, abs=2)


@pytest.mark.parametrize(
    ("name", "level", "growth", "flat"),
    [
        ("memory_mib", 100, 8, True),
        ("memory_mib", 100, 9, False),
        ("memory_mib", 1000, 29, True),
        ("memory_mib", 1000, 31, False),
        ("memory_mib", 1000, -500, True),
        ("descriptors", 20, 2, True),
        ("descriptors", 20, 3, False),
        ("threads", 100, 3, False),
        ("processes", 2, 3, False),
    ],
)
def test_bounds(name: str, level: float, growth: float, flat: bool) -> None:
    assert BOUNDS[name].holds(growth, level) is flat


def test_too_few_samples_show_nothing() -> None:
    with pytest.raises(ValueError, match="2 samples after 80 s do not show whether anything grows"):
        samples([1.0] * 10).judged(80.0)


def test_what_a_process_has_is_counted() -> None:
    before = usage(os.getpid())
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    reading, writing = os.pipe()
    try:
        with closing(mmap.mmap(-1, 64 * 2**20)) as held:  # new pages: a bytearray may take what was freed before
            for page in range(0, len(held), mmap.PAGESIZE):
                held[page] = 1
            more = usage(os.getpid())
    finally:
        release.set()
        thread.join()
        os.close(reading)
        os.close(writing)
    assert more["threads"] == before["threads"] + 1
    assert more["descriptors"] == before["descriptors"] + 2
    assert more["memory_mib"] > before["memory_mib"] + 50


def test_what_the_work_raises_ends_the_soak() -> None:
    async def fails(addresses: object, done: object) -> None:
        raise RuntimeError("the service is gone")

    with pytest.raises(RuntimeError, match="the service is gone"):
        asyncio.run(measure({"own": os.getpid()}, {}, (fails,), seconds=0.2, every=0.05))
