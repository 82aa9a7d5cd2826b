"""Evaluation protocols, over gRPC against four real processes: from the command line and in a run."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from typer.testing import CliRunner

from mulligan.cli.app import app
from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.types import Split
from mulligan.env.client import EnvClient
from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.client import RunClient
from mulligan.trainer.events import EvaluationEvent
from mulligan.trainer.settings import EvaluationSettings
from mulligan.trainer.wire import validated

LAKE = "frozenlake-3x3"
PASS = {"name": "pass_at_k", "k": [1, 3]}


@pytest.fixture(scope="module")
def loop(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    return Loop.start(shared_services, tmp_path_factory.mktemp("loop"), deterministic=True)


@pytest.fixture
async def client(loop: Loop) -> AsyncIterator[RunClient]:
    client = loop.client()
    yield client
    await client.close()


def measuring(*protocols: Any) -> EvaluationSettings:
    return validated(EvaluationSettings, {"tasks": 4, "samples": 1, "protocols": list(protocols)})


async def test_an_evaluation_has_the_metrics_of_its_protocols_and_repeats(client: RunClient) -> None:
    told: list[tuple[int, int, float | None, str]] = []

    async def measured() -> EvaluationEvent:
        settings = measuring(PASS, {"name": "misled", "label": "wrong"})
        result, _ = await client.evaluate(
            LAKE, settings, seed=3, max_tokens=4, on_progress=lambda *one: told.append(one)
        )
        return result

    result = await measured()
    assert {name for name in result.metrics if name.startswith("pass_at_k/")} == {
        "pass_at_k/pass@1",
        "pass_at_k/pass@3",
    }
    assert result.metrics["pass_at_k/pass@1"] <= result.metrics["pass_at_k/pass@3"]
    assert any(name.startswith("wrong/") for name in result.metrics)
    assert {protocol for *_, protocol in told} == {"", "pass_at_k", "wrong"}
    assert told[-1][:2] == (8, 8) and all(ended <= total for ended, total, *_ in told)
    assert await measured() == result


async def test_what_does_not_fit_is_refused_by_name(client: RunClient) -> None:
    for protocols, field in (
        ([PASS, {"name": "refusal"}], "protocols[1].name"),
        ([{"name": "steerability"}], "protocols[0].name"),
    ):
        with pytest.raises(DomainError) as caught:
            await client.evaluate(LAKE, measuring(*protocols))
        assert (caught.value.reason, caught.value.metadata) == (Reason.INVALID_SETTING, {"field": field})


async def test_a_run_has_them_in_its_events_and_summary(loop: Loop, client: RunClient) -> None:
    evaluation = {"tasks": 2, "samples": 1, "protocols": [PASS]}
    await loop.train("measured", small_run(steps=1, checkpoint_every=1, evaluation=evaluation))
    events = [entry.event async for entry in client.watch("measured")]
    metrics = [event.metrics for event in events if isinstance(event, EvaluationEvent)]
    assert len(metrics) == 2 and all(set(one) == {"pass_at_k/pass@1", "pass_at_k/pass@3"} for one in metrics)
    info = await client.get("measured")
    assert [protocol.model_dump() for protocol in info.settings.evaluation.protocols] == [
        {"name": "pass_at_k", "label": None, "k": (1, 3), "samples": None}
    ]
    summary = json.loads((loop.folder / "runs" / "measured" / "summary.json").read_text())
    assert [one["metrics"] for one in summary["evaluations"]] == metrics


async def test_tags_of_tasks_cross_the_wire(loop: Loop) -> None:
    client = EnvClient(Endpoint(loop.env.address))
    tasks = await client.list_tasks("unanswerable", Split.TEST, 0)
    await client.close()
    assert {task.tags["answerable"] for task in tasks} == {"true", "false"}


def test_the_command_line_shows_them(loop: Loop) -> None:
    def shown(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["eval", LAKE, *arguments, "--trainer", loop.trainer.address])

    few = ("--tasks", "2", "--samples", "1", "--max-tokens", "4")
    result = shown(
        *few, "--protocol", "pass_at_k", "--protocol", "turns", "--set", "pass_at_k.k=[2]", "--set", "turns.tries=2"
    )
    assert result.exit_code == 0, result.output
    for line in ("pass_at_k\n", "  pass@2  ", "turns\n", "  guided_success@2 "):
        assert line in result.output
    for arguments, words in (
        (("--protocol", "pas_at_k"), "did you mean 'pass_at_k'?"),
        (("--protocol", "pass_at_k", "--set", "kk=[2]"), "protocols[0].kk"),
        (("--set", "k=[2]"), "expected PROTOCOL.NAME with a protocol of --protocol (none is given)"),
        (("--protocol", "refusal"), "'refusal' cannot be measured in 'frozenlake-3x3'"),
    ):
        refused = shown(*arguments)
        assert refused.exit_code in (1, 2) and words in " ".join(refused.output.split()), refused.output
