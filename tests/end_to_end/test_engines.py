"""A run on engines of other makers: SGLang is trained, and reflects through its OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import WeightsKind
from mulligan.models import EMBEDDED
from mulligan.policy.client import PolicyClient
from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.settings import EvaluationSettings
from tests.support.found import sglang_address
from tests.support.policy_backends import restore, served_name

LAKE = "frozenlake-3x3"
LORA = {"rank": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}  # what the server was started for


@pytest.fixture(scope="module")
def loop(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    address = sglang_address()
    asyncio.run(restore("sglang"))  # the name that it serves under is the path of its last weights
    hosted = {"backend": "openai", "model": served_name(address), "openai": {"base_url": f"{address}/v1"}}
    second = {"backend": "sglang", "model": str(EMBEDDED), "sglang": {"servers": [address], "adapters_only": True}}
    policies = {"hosted": hosted, "second": second}
    policy = {"backend": "sglang", "model": EMBEDDED, "sglang": {"servers": [address]}, "policies": policies}
    yield Loop.start(shared_services, tmp_path_factory.mktemp("loop"), policy=policy)
    shared_services.end()
    asyncio.run(restore("sglang"))


async def test_sglang_is_trained_and_an_endpoint_reflects(loop: Loop) -> None:
    policy = PolicyClient(Endpoint(loop.policy.address))
    before = (await policy.info()).policy_version
    await loop.train("full", small_run(steps=2, policies={"actor": "actor", "reflector": "hosted"}))
    assert (await policy.info()).policy_version == before + 3
    await policy.close()
    chains = loop.experiences("full")
    reflections = [one for chain in chains for one in chain.samples if one.role == "reflection"]
    assert reflections and all(reflection.policy == "hosted" and reflection.text for reflection in reflections)
    assert [sequence.sampled_count for r in reflections for sequence in r.sequences] == [0] * len(reflections)
    for metrics in await loop.metrics("full"):
        assert metrics["canary_difference"] < 1e-4 and metrics["excluded"] == 0
        assert "reflection/loss" not in metrics and metrics["grad_norm"] > 0
        assert abs(metrics.get("mismatch_kl", 0)) < 1e-6, "engine and learner agree"


async def test_adapters_are_trained_on_sglang(loop: Loop) -> None:
    await loop.train("lora", small_run(steps=1, model={"source": "embedded", "lora": LORA}))
    (metrics,) = await loop.metrics("lora")
    assert metrics["canary_difference"] < 1e-4 and metrics["excluded"] == 0 and metrics["grad_norm"] > 0


async def test_adapters_are_evaluated_beside_training_on_the_same_server(loop: Loop) -> None:
    """The second policy has the evaluated adapter there, while the first takes the next ones."""
    changes: dict[str, Any] = {
        "evaluation": {"every": 1, "samples": 1, "tasks": 4},
        "policies": {"evaluator": "second"},
    }
    info = await loop.train("beside", small_run(steps=2, model={"source": "embedded", "lora": LORA}, **changes))
    assert info.step == 2
    summary = json.loads((loop.folder / "runs" / "beside" / "summary.json").read_text())
    assert [point["step"] for point in summary["evaluations"]] == [0, 1, 2]
    policy = PolicyClient(Endpoint(loop.policy.address))
    versions = await policy.versions("second")
    assert [one.kind for one in versions] == [*[WeightsKind.LORA] * 3, WeightsKind.ORIGINAL], "one for each evaluation"
    await policy.close()
    log = (loop.folder / "runs" / "beside" / "events.jsonl").read_text()
    assert "the learner waits for each evaluation" not in log


async def test_an_endpoint_is_measured_and_not_trained(loop: Loop) -> None:
    trainer = loop.client()
    settings = EvaluationSettings(tasks=4, samples=1, top_k=0)
    result, _ = await trainer.evaluate(LAKE, settings, max_tokens=8, policy="hosted")
    assert (result.attempts, result.excluded) == (4, 0)
    with pytest.raises(DomainError) as caught:
        await trainer.evaluate(LAKE, settings.model_copy(update={"top_k": 20}), policy="hosted")
    assert (caught.value.reason, caught.value.metadata) == (Reason.INVALID_SETTING, {"field": "top_k"})
    await trainer.start("hosted", small_run(steps=1, policies={"actor": "hosted"}))
    assert "policies.actor: policy 'hosted' (openai) cannot be trained: no token_ids" in await loop.failure("hosted")
    await trainer.close()
