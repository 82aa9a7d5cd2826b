"""Which model answers whom while LoadModel replaces it: a session finishes on the model that it began with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import CallOptions, Continuation, Message, Role, SamplingParams, StopReason
from mulligan.models import EMBEDDED
from mulligan.policy import policy
from mulligan.testing.weights import load, plain_log_probs
from tests.support.llama_model import write_llama_model
from tests.support.policy import Serving, serving
from tests.support.scripted import Opened, ScriptedBackend
from tests.support.waiting import until

PROMPT = [1, 2, 3]
PLAIN = SamplingParams()


@dataclass
class Swapping:
    served: Serving
    opened: Opened
    clock: float = 1e6

    def backend(self, model: str) -> ScriptedBackend:
        return self.opened[model]

    async def load(self, model: str, policy: str = "actor") -> int:
        version, _ = await self.served.client.load_model(policy, model)
        return version

    async def version(self, session: str = "", policy: str = "") -> int:
        """That answers a call."""
        options = CallOptions(session_id=session, policy=policy)
        completion = await self.served.client.generate(PROMPT, PLAIN, options)
        [version] = {span.policy_version for span in completion.policy_versions}
        return version

    @property
    def draining(self) -> int:
        return self.served.policies.get().info.draining_models


@pytest.fixture
async def running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Swapping]:
    """Sessions may be idle for an hour of its own clock."""
    opened = Opened()
    async with serving("one", create=opened.create, session_idle_seconds=3600) as served:
        swapping = Swapping(served, opened)
        monkeypatch.setattr("mulligan.policy.policy.monotonic", lambda: swapping.clock)
        yield swapping


async def looked() -> None:
    """Whoever waits for sessions to end has looked at them in the meantime."""
    await asyncio.sleep(3 * policy._LOOK_SECONDS)


async def test_sessions_stay_and_all_others_go_to_the_new_model(running: Swapping) -> None:
    assert [await running.version(session) for session in ("a", "b", "")] == [0, 0, 0]
    assert await running.load("two") == 1
    assert await running.version() == 1 and await running.version("c") == 1
    assert await running.version("a") == 0
    assert await running.load("three") == 2
    assert [await running.version(session) for session in ("a", "b", "c", "d", "")] == [0, 0, 1, 2, 2]
    assert running.draining == 2


async def test_every_kind_of_call_is_of_its_session(running: Swapping) -> None:
    client = running.served.client
    old = running.backend("one")
    await client.tokenize("it begins", CallOptions(session_id="a"))
    assert await parts(running, CallOptions(session_id="b")) == {0}
    await client.sample(PROMPT, PLAIN, 2, CallOptions(session_id="c"))
    await running.load("two")
    assert [await running.version(session) for session in "abc"] == [0, 0, 0]
    asked = len(old.asks)
    assert await parts(running, CallOptions(session_id="a")) == {0}
    await client.sample(PROMPT, PLAIN, 2, CallOptions(session_id="a"))
    assert len(old.asks) == asked + 3


async def test_a_session_is_one_of_a_policy(running: Swapping) -> None:
    assert await running.load("two", "other") == 0
    assert await running.version("a", "other") == 0 and len(running.backend("two").asks) == 1
    assert await running.load("three") == 1
    assert await running.version("a") == 1, "it began on another policy"
    assert await running.version("a", "other") == 0 and len(running.backend("two").asks) == 2


async def test_a_replaced_model_that_nobody_needs_is_closed_at_once(running: Swapping) -> None:
    await running.version()
    await running.load("two")
    await until(lambda: running.backend("one").closed and running.draining == 0)


async def test_it_is_closed_when_its_sessions_have_not_asked_for_a_while(running: Swapping) -> None:
    await running.version("a")
    await running.load("two")
    for _ in range(4):
        running.clock += 3599
        await looked()
        assert await running.version("a") == 0, "whoever asks keeps it"
    assert not running.backend("one").closed and running.draining == 1
    running.clock += 3601
    await until(lambda: running.backend("one").closed and running.draining == 0)
    assert await running.version("a") == 1, "a session that comes too late begins anew"


@pytest.mark.parametrize("session", ["", "a"])
async def test_calls_in_flight_finish_however_long_they_take(running: Swapping, session: str) -> None:
    old = running.backend("one")
    old.go_on.clear()
    options = CallOptions(session_id=session)
    call = asyncio.create_task(running.served.client.generate(PROMPT, PLAIN, options))
    stream = asyncio.create_task(parts(running, options))
    await until(lambda: len(old.asks) == 2)
    await running.load("two")
    running.clock += 10**6
    await looked()
    assert not old.closed and running.draining == 1
    assert await running.version() == 1
    old.go_on.set()
    assert {span.policy_version for span in (await call).policy_versions} == {0} == await stream
    running.clock += 3601
    await until(lambda: old.closed)


async def parts(swapping: Swapping, options: CallOptions) -> set[int]:
    stream = swapping.served.client.stream(PROMPT, PLAIN, 1, options)
    return {span.policy_version async for part in stream for span in part.policy_versions}


async def test_of_more_sessions_than_are_kept_those_are_forgotten_that_asked_longest_ago(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mulligan.policy.policy._MOST_SESSIONS", 3)
    opened = Opened()
    async with serving("one", create=opened.create) as served:
        swapping = Swapping(served, opened)
        for session in ("a", "b", "c", "a", "d"):
            await swapping.version(session)
        await swapping.load("two")
        assert [await swapping.version(session) for session in ("a", "c", "d", "b")] == [0, 0, 0, 1]


async def test_seconds_in_closed_models_are_counted(running: Swapping) -> None:
    assert (await running.served.client.info()).compute_seconds == 1.5
    await running.load("two")
    await until(lambda: running.backend("one").closed)
    assert (await running.served.client.info()).compute_seconds == 3.0


async def test_a_service_that_stops_closes_all_models() -> None:
    opened = Opened()
    async with serving("one", create=opened.create, session_idle_seconds=3600) as served:
        swapping = Swapping(served, opened)
        await swapping.version("a")
        await swapping.load("two")
        assert not any(backend.closed for backend in opened.backends)
    assert all(backend.closed for backend in opened.backends)
    assert not any(folder.exists() for folder in opened.folders)


async def test_conversations_finish_on_the_model_that_sampled_their_tokens(tmp_path: Path) -> None:
    """Real models with tokenizers of their own: under the other one the tokens would be another text, or none."""
    llama = write_llama_model(tmp_path / "llama")
    async with serving("embedded", models_folder=tmp_path, session_idle_seconds=3600, slots=16) as served:
        references = {0: load(EMBEDDED), 1: load(llama)}
        swapped = asyncio.Event()
        begun: set[str] = set()

        async def converse(name: str) -> set[int]:
            """Turns until some have passed since the swap; all log-probabilities are those of one model."""
            token_ids: tuple[int, ...] = ()
            sampled: dict[int, float] = {}
            versions: set[int] = set()
            prompt: tuple[Message, ...] | Continuation = (Message(Role.USER, f"{name} A B"),)
            after = 0
            while after < 3:
                after += swapped.is_set()
                completion = await served.client.generate(
                    prompt, SamplingParams(max_tokens=5), CallOptions(session_id=name)
                )
                begun.add(name)
                token_ids += completion.prompt_token_ids
                sampled |= dict(enumerate(completion.log_probs, start=len(token_ids)))
                token_ids += completion.token_ids
                versions |= {span.policy_version for span in completion.policy_versions}
                closed = completion.stop_reason is StopReason.END_OF_TURN
                prompt = Continuation(token_ids, closed, (Message(Role.USER, "C"),))
            [version] = versions
            expected = plain_log_probs(references[version], token_ids)
            for position, log_prob in sampled.items():
                assert log_prob == pytest.approx(expected[position - 1], abs=1e-3)
            return versions

        early = [asyncio.create_task(converse(f"early{index}")) for index in range(8)]
        await until(lambda: len(begun) == 8)
        assert await served.client.load_model("actor", str(llama)) == (1, (await served.client.info()).fingerprint)
        late = [asyncio.create_task(converse(f"late{index}")) for index in range(8)]
        swapped.set()
        assert await asyncio.gather(*early) == [{0}] * 8
        assert await asyncio.gather(*late) == [{1}] * 8
        with pytest.raises(DomainError) as caught:
            await served.client.generate([340], PLAIN, CallOptions(session_id="early0"))
        assert caught.value.reason is Reason.TOKEN_OUT_OF_VOCABULARY
        await served.client.generate([340], PLAIN)
