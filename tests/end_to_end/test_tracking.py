"""A run that is stopped and resumed, and its TensorBoard files."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mulligan.testing.loop import RUN_SECONDS, Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.events import EvaluationEvent, StepEvent


def test_a_stopped_and_resumed_run_has_each_metric_of_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    logs.mkdir()
    services = ServiceProcesses(logs, forked=True)
    try:
        loop = Loop.start(services, tmp_path)
        expected = asyncio.run(stopped_and_resumed(loop))
    finally:
        services.end()
    folder = tmp_path / "runs" / "run-1" / "tracking" / "tensorboard"
    files = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = [(name, one.step) for name in files.Tags()["scalars"] for one in files.Scalars(name)]
    assert len(list(folder.iterdir())) > 1  # one of each start
    assert sorted(found) == sorted(expected)


async def stopped_and_resumed(loop: Loop) -> list[tuple[str, int]]:
    """Names and steps of the run's metrics."""
    client = loop.client()
    try:
        await client.start("run-1", small_run(steps=4, tracking={"writers": ["tensorboard"]}))
        async with asyncio.timeout(RUN_SECONDS):
            async for entry in client.watch("run-1"):
                if isinstance(entry.event, StepEvent) and entry.event.step == 0:
                    await client.stop("run-1")
        assert (await client.get("run-1")).step < 4
        await client.resume("run-1")
        await loop.ended(client, "run-1")
        events = [entry.event async for entry in client.watch("run-1")]
    finally:
        await client.close()
    own = ("success", "mean_reward", "attempts", "excluded")
    steps = [(name, event.step) for event in events if isinstance(event, StepEvent) for name in event.metrics]
    measured = [event for event in events if isinstance(event, EvaluationEvent)]
    assert {step for _, step in steps} == {0, 1, 2, 3} and [event.step for event in measured] == [0, 4]
    return steps + [(f"evaluation/{name}", event.step) for event in measured for name in own]
