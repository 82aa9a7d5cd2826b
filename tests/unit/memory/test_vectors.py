"""Embeddings of texts and callers: unit vectors, made in a thread, many together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mulligan.common.errors import DomainError
from mulligan.memory.embedder import CannotEmbed
from mulligan.memory.vectors import Vectors


class Counting:
    """Embeds a text as its length and its number of words. It waits for `begin`."""

    name = "counting"
    size = 2

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.begin = threading.Event()
        self.threads: set[str] = set()
        self.answer: Any = None

    def embed(self, texts: Sequence[str]) -> Any:
        self.begin.wait()
        self.calls.append(list(texts))
        self.threads.add(threading.current_thread().name)
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is not None:
            return self.answer
        return np.array([[len(text), len(text.split())] for text in texts], np.float32)


@pytest.fixture
def embedder() -> Counting:
    made = Counting()
    made.begin.set()
    return made


async def test_vectors_have_length_1(embedder: Counting) -> None:
    vectors = Vectors(embedder)
    assert await vectors.of("", ()) == (), "nothing to embed"
    assert await vectors.of("abc d e", ()) == pytest.approx((7 / 58**0.5, 3 / 58**0.5))
    assert await vectors.of("text", (3.0, -4.0)) == (0.6, -0.8)
    assert vectors.unit((1e-38, 0.0)) == (1.0, 0.0)
    assert await Vectors(None).of("text", ()) == ()


async def test_texts_that_wait_together_share_a_call_in_a_thread(embedder: Counting) -> None:
    vectors = Vectors(embedder)
    embedder.begin.clear()
    tasks = [asyncio.create_task(vectors.of("a" * number, ())) for number in range(1, 101)]
    given_up = asyncio.create_task(vectors.of("never asked for", ()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    given_up.cancel()
    embedder.begin.set()
    for number, vector in enumerate(await asyncio.gather(*tasks), 1):
        assert vector == pytest.approx((number / (number**2 + 1) ** 0.5, 1 / (number**2 + 1) ** 0.5))
    assert [len(call) for call in embedder.calls] == [64, 37]
    assert threading.main_thread().name not in embedder.threads
    assert await vectors.of("b", ()) == pytest.approx((0.5**0.5, 0.5**0.5)), "it goes on"


async def test_a_failure_is_the_answer_to_its_texts_alone(embedder: Counting) -> None:
    vectors = Vectors(embedder)
    embedder.answer = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        await vectors.of("text", ())
    for answer, said in (
        (np.zeros((1, 3)), "counting: .* numbers for 1 texts"),
        (np.full((1, 2), np.nan), "not finite"),
    ):
        embedder.answer = answer
        with pytest.raises(ValueError, match=said):
            await vectors.of("text", ())
    embedder.answer = CannotEmbed("2 numbers")
    with pytest.raises(DomainError, match="embedding: expected 2 numbers"):
        await vectors.of("text", ())
    embedder.answer = None
    assert len(await vectors.of("text", ())) == 2
