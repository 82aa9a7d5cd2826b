"""What many calls of LoadModel, and policies that are gone, leave in the memory of a service."""

from __future__ import annotations

import asyncio
import gc
import uuid
import weakref

import pytest
from prometheus_client import generate_latest

from mulligan.common.errors import Code, Reason
from mulligan.common.inference import CallOptions, Message, Role, SamplingParams
from mulligan.common.metrics import REGISTRY, BoundedNames
from tests.support.scripted import refused, started
from tests.support.waiting import until

PLAIN = SamplingParams()


async def test_of_many_that_come_at_once_as_many_are_loaded_as_there_may_be() -> None:
    """A model that is being replaced counts until it is closed."""
    async with started(max_models=3, session_idle_seconds=0.01) as running:
        running.opened.go_on.clear()
        loading = [asyncio.create_task(running.client.load_model(f"p{i}", "two")) for i in range(5)]
        await until(lambda: sum(task.done() for task in loading) == 3)
        for task in loading:
            if task.done():
                await refused(task, Reason.CAPACITY_REACHED, Code.RESOURCE_EXHAUSTED)
        await until(lambda: len(running.opened.asked) == 3)  # the default policy's, and two
        running.opened.go_on.set()
        await asyncio.gather(*loading, return_exceptions=True)
        await refused(running.client.load_model("actor", "three"), Reason.CAPACITY_REACHED, Code.RESOURCE_EXHAUSTED)
        [first, second] = [info.name for info in await running.client.policies() if info.name != "actor"]
        await running.client.unload_model(first)
        held = running.opened["one"]
        held.may_close.clear()
        await running.client.load_model("actor", "three")
        error = await refused(
            running.client.load_model("other", "two"), Reason.CAPACITY_REACHED, Code.RESOURCE_EXHAUSTED
        )
        assert "3 of at most 3" in error.message and "1 of them replaced" in error.message
        held.may_close.set()
        await until(lambda: held.closed and len(running.served.policies.get().deployments) == 1)
        await running.client.load_model("other", "two")
        assert {info.name for info in await running.client.policies()} == {"actor", second, "other"}


async def test_changes_whose_callers_left_are_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulligan.policy.policies._MOST_CHANGES", 2)
    async with started() as running:
        running.opened.go_on.clear()
        load_model = running.served.policies.load_model
        for name in ("a", "b"):
            leaving = asyncio.create_task(load_model(name, "two"))
            await until(lambda: len(running.opened.asked) == 1 + "ab".index(name) + 1)  # noqa: B023 - awaited here
            leaving.cancel()
        error = await refused(load_model("c", "two"), Reason.QUEUE_FULL, Code.RESOURCE_EXHAUSTED)
        assert error.retry_after is not None
        running.opened.go_on.set()
        await until(lambda: not running.served.policies._tasks)
        assert [info.name for info in await running.client.policies()] == ["a", "actor", "b"]
        await load_model("c", "two")


def unique() -> str:
    """A policy of no other test: the series of a policy stay in the process when its server ends."""
    return f"p{uuid.uuid4().hex}"


async def test_a_policy_that_is_gone_has_no_metrics() -> None:
    """Callers choose the names."""
    async with started() as running:
        gone = unique()
        await running.client.load_model(gone, "two")
        await running.serves("two", 0, gone)
        assert f'mulligan_policy_sampled_tokens_total{{policy="{gone}"}}' in generate_latest(REGISTRY).decode()
        await running.client.unload_model(gone)
        assert gone not in generate_latest(REGISTRY).decode()


async def test_policies_beyond_the_named_ones_share_their_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers choose the names, and Prometheus keeps each for long."""
    monkeypatch.setattr("mulligan.policy.metrics.NAMES", BoundedNames(most=2))
    async with started() as running:
        named, third, fourth = unique(), unique(), unique()
        for name in (named, third, fourth):
            await running.client.load_model(name, "two")
        text = generate_latest(REGISTRY).decode()
        assert f'mulligan_policy_sampled_tokens_total{{policy="{named}"}}' in text
        assert third not in text and fourth not in text
        assert 'mulligan_policy_sampled_tokens_total{policy="other"}' in text
        gauges = {sample.labels["policy"] for each in running.served.policies.collect() for sample in each.samples}
        assert gauges == {"actor", named}
        for name in (third, named):
            await running.client.unload_model(name)
        text = generate_latest(REGISTRY).decode()
        assert named not in text and 'policy="other"' in text


async def test_a_replaced_model_is_forgotten_with_its_sessions() -> None:
    """What it kept of prompts would stay as long as its sessions are remembered."""
    async with started(session_idle_seconds=0.01) as running:
        for place in range(3):
            await running.client.sample((Message(Role.USER, "x"),), PLAIN, 1, CallOptions(session_id=f"s{place}"))
        replaced = weakref.ref(running.served.deployment)
        await running.client.load_model("actor", "two")
        await running.client.sample((Message(Role.USER, "x"),), PLAIN, 1, CallOptions(session_id="s3"))
        await until(lambda: gc.collect() >= 0 and replaced() is None)
