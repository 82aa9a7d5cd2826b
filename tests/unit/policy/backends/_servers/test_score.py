"""A Score of thousands of sequences is one request of the queue, and copies and asks for a few of them at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.policy.backends._servers import backend as module
from mulligan.policy.backends.sglang.backend import SglangBackend
from mulligan.policy.v1 import policy_service_pb2 as pb


class Scores(SglangBackend):
    """`running` are the sequences that are being scored, `begun` those of each batch."""

    def __init__(self, max_queue: int) -> None:
        self.settings: Any = SimpleNamespace(max_queue=max_queue)
        self.in_flight = 0
        self.running = self.most = self.asked = 0
        self.begun: list[list[list[int]]] = []
        self.go_on = asyncio.Event()

    async def _score(self, ids: Sequence[int], temperature: float, adapter: str) -> tuple[int, tuple[float, ...]]:
        assert type(ids) is list, "what a message has is no JSON"
        if self.running == 0:
            self.begun.append([])
        self.begun[-1].append(ids)
        self.running += 1
        self.asked += 1
        self.most = max(self.most, self.running)
        await self.go_on.wait()
        await asyncio.sleep(0)  # those of the same batch begin before it ends
        self.running -= 1
        return 3, (float(ids[0]),)


async def test_a_score_of_many_sequences_begins_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCORED_AT_ONCE", 5)
    backend: Any = Scores(max_queue=1)
    call = asyncio.create_task(backend.score([[index, 0] for index in range(13)], 1.0))
    for _ in range(5):
        await asyncio.sleep(0)
    assert backend.running == 5
    with pytest.raises(DomainError) as caught:
        await backend.score([[1, 2]], 1.0)
    assert caught.value.reason is Reason.QUEUE_FULL and caught.value.retry_after is not None
    assert backend.asked == 5
    backend.go_on.set()
    scored = await call
    assert scored.log_probs == tuple((float(index),) for index in range(13)) and scored.policy_version == 3
    assert backend.most == 5 and backend.in_flight == 0
    assert len((await backend.score([[1, 2]], 1.0)).log_probs) == 1, "there is room again"


async def test_a_score_of_many_tokens_copies_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCORED_AT_ONCE", 3)
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", 10)
    backend: Any = Scores(max_queue=1)
    backend.go_on.set()
    lengths = (4, 6, 1, 30, 10, 2, 2, 2, 2, 9)
    request = pb.ScoreRequest(sequences=[pb.TokenIds(ids=[index] * length) for index, length in enumerate(lengths)])
    scored = await backend.score([sequence.ids for sequence in request.sequences], 1.0)
    assert scored.log_probs == tuple((float(index),) for index in range(len(lengths)))
    batches = [[len(ids) for ids in batch] for batch in backend.begun]
    assert batches == [[4, 6], [1], [30], [10], [2, 2, 2], [2], [9]]
