"""Updates of a policy's weights with any backend that takes them: verified completely, never mixed, and the
log-probabilities that follow are those of a plain forward pass of the same weights."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mulligan.common.access import AccessRole
from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import CallOptions, CanaryProbe, PublishedWeights, SamplingParams, WeightsKind
from mulligan.models import EMBEDDED
from mulligan.models.build import build_model
from mulligan.policy.client import PolicyClient
from mulligan.testing.processes import ServiceProcesses
from mulligan.testing.weights import full_weights, load, plain_log_probs, sha256
from tests.support.policy import serving
from tests.support.policy_backends import WITH_WEIGHTS, Running, reference, restore, running
from tests.support.tokens import token_of, write_tokens
from tests.support.waiting import until

PROMPT = list(range(7, 37))
PROBES = (PROMPT, [5, 9, 300], list(range(60, 140)))
ATTENTION = ["q_proj", "v_proj", "o_proj"]


@pytest.fixture(params=WITH_WEIGHTS)
async def policy(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Running]:
    """Weights may be loaded from below `tmp_path / "weights"`."""
    (tmp_path / "weights").mkdir()
    try:
        async with running(request.param, weights_folder=tmp_path / "weights") as served:
            yield served
    finally:
        await restore(request.param)


def published(policy: Running, folder: Path, model: Any, version: int, **changes: Any) -> PublishedWeights:
    """All parameters of the model, with what its own forward pass says of the probes."""
    canary = tuple(CanaryProbe(tuple(probe), tuple(plain_log_probs(model, probe))) for probe in PROBES)
    path = folder / "weights" / f"{version}.safetensors"
    weights = full_weights(path, model.state_dict(), version, policy.info.fingerprint, canary=canary)
    return replace(weights, **changes)


def adapter(folder: Path, targets: list[str], seed: int, **settings: Any) -> Any:
    """A LoRA adapter that changes something, saved by peft, and the model with it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    tuned = get_peft_model(load(EMBEDDED), config)
    for parameter_name, parameter in tuned.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(str(folder))
    return tuned.eval()


def adapted(policy: Running, folder: Path, version: int, model: Any = None) -> PublishedWeights:
    probes = PROBES if model is not None else ()
    canary = tuple(CanaryProbe(tuple(probe), tuple(plain_log_probs(model, probe))) for probe in probes)
    checksum = sha256(folder / "adapter_model.safetensors")
    uri = folder.resolve().as_uri()
    return PublishedWeights(version, WeightsKind.LORA, uri, checksum, policy.info.fingerprint, canary)


async def update(policy: Running, weights: PublishedWeights) -> None:
    difference = await policy.client.update_weights(weights)
    assert (difference is not None) == bool(weights.canary)
    assert difference is None or difference < 1e-4


async def serves(policy: Running, model: Any, version: int) -> None:
    """This version answers, with the log-probabilities of this model."""
    options = CallOptions(min_policy_version=version)
    completion = await policy.client.generate(PROMPT, SamplingParams(max_tokens=6), options)
    expected = plain_log_probs(model, [*PROMPT, *completion.token_ids])[len(PROMPT) - 1 :]
    assert completion.log_probs == pytest.approx(expected, abs=1e-4)
    assert {span.policy_version for span in completion.policy_versions} == {version}
    scored = await policy.client.score([PROMPT], 1.0)
    assert scored.policy_version == version
    assert scored.log_probs[0] == pytest.approx(plain_log_probs(model, PROMPT), abs=1e-4)
    assert (await policy.client.info()).policy_version == version


async def refused(policy: Running, weights: PublishedWeights, reason: Reason) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await policy.client.update_weights(weights)
    assert caught.value.reason is reason, str(caught.value)
    return caught.value


async def test_full_weights_replace_all_and_forget_what_was_cached(policy: Running, tmp_path: Path) -> None:
    await serves(policy, reference(), 0)
    for version in (1, 5):
        other = build_model(version)
        weights = published(policy, tmp_path, other, version)
        await update(policy, weights)
        await serves(policy, other, version)
        await update(policy, weights)  # a retry changes nothing
    for conflicting in (
        replace(weights, sha256="0" * 64),
        replace(weights, policy_version=4),
        replace(weights, policy_version=1),
    ):
        await refused(policy, conflicting, Reason.VERSION_CONFLICT)
    await serves(policy, other, 5)


async def test_small_updates_of_either_kind_end_where_the_trainer_is(policy: Running, tmp_path: Path) -> None:
    """Small steps, as training makes them: a version that was not taken would show in the log-probabilities."""
    trained = load(EMBEDDED)
    generator = torch.Generator().manual_seed(0)
    for version in range(1, 5):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(0.003 * torch.randn(parameter.shape, generator=generator))
        await update(policy, published(policy, tmp_path, trained, version))
    await serves(policy, trained, 4)
    for version in range(5, 9):
        folder = tmp_path / "weights" / f"adapter-{version}"
        tuned = adapter(folder, ATTENTION, version)
        await update(policy, adapted(policy, folder, version, tuned))
    await serves(policy, tuned, 8)


async def test_an_adapter_changes_the_weights_that_the_model_came_with(policy: Running, tmp_path: Path) -> None:
    """Whatever was served before: another adapter of other layers, or full weights."""
    folder = tmp_path / "weights"
    first = adapter(folder / "a", ATTENTION, 1)
    second = adapter(folder / "b", ["k_proj"], 2, use_rslora=True)
    other = build_model(3)
    for version, model, weights in (
        (1, first, adapted(policy, folder / "a", 1, first)),
        (2, second, adapted(policy, folder / "b", 2, second)),
        (3, other, published(policy, tmp_path, other, 3)),
        (4, first, adapted(policy, folder / "a", 4, first)),
        (5, first, adapted(policy, folder / "a", 5, first)),
    ):
        await update(policy, weights)
        await serves(policy, model, version)


async def test_adapters_that_are_not_plain_lora_are_refused(policy: Running, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    refused_settings: dict[str, dict[str, Any]] = {
        "use_dora": {"use_dora": True},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "init_lora_weights": {"init_lora_weights": "pissa"},
        'init_lora_weights = "olora"': {"init_lora_weights": "olora"},
    }
    for name, settings in refused_settings.items():
        adapter(folder / name, ["q_proj"], 1, **settings)
        error = await refused(policy, adapted(policy, folder / name, 1), Reason.MODEL_MISMATCH)
        assert name in error.message
    adapter(folder / "edited", ["q_proj"], 1)
    config = folder / "edited" / "adapter_config.json"
    plain = json.loads(config.read_text())
    for change in ({"alpha_pattern": {"q_proj": 3}}, {"bias": "all"}, {"lora_alpha": None}):
        config.write_text(json.dumps(plain | change))
        await refused(policy, adapted(policy, folder / "edited", 1), Reason.MODEL_MISMATCH)
    config.unlink()
    await refused(policy, adapted(policy, folder / "edited", 1), Reason.WEIGHTS_NOT_FOUND)
    await serves(policy, reference(), 0)


async def test_bad_weights_are_refused_before_anything_is_touched(policy: Running, tmp_path: Path) -> None:
    inside = tmp_path / "weights"
    good = build_model(1).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"

    def written(tensors: dict[str, torch.Tensor], **changes: Any) -> PublishedWeights:
        return full_weights(inside / "weights.safetensors", tensors, 1, policy.info.fingerprint, **changes)

    def truncated() -> PublishedWeights:
        weights = written(good)
        path = inside / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        return replace(weights, sha256=sha256(path))

    def outside() -> PublishedWeights:
        return full_weights(tmp_path / "outside.safetensors", good, 1, policy.info.fingerprint)

    def linked() -> PublishedWeights:
        (inside / "link").symlink_to(tmp_path / "outside.safetensors")
        return replace(outside(), uri=(inside.resolve() / "link").as_uri())

    poisoned = good[name].clone()
    poisoned[3, 4] = float("nan")
    uri = inside.resolve().as_uri()
    mismatch = Reason.MODEL_MISMATCH
    bad_uri = Reason.BAD_WEIGHTS_URI
    cases: dict[str, tuple[Callable[[], PublishedWeights], Reason]] = {
        "corrupt": (truncated, mismatch),
        "other checksum": (lambda: written(good, sha256="a" * 64), Reason.CHECKSUM_MISMATCH),
        "absent": (lambda: written(good, uri=f"{uri}/none"), Reason.WEIGHTS_NOT_FOUND),
        "a folder": (lambda: written(good, uri=f"{uri}/sub/.."), bad_uri),
        "above": (lambda: written(good, uri=f"{uri}/../outside.safetensors"), bad_uri),
        "outside": (outside, bad_uri),
        "a link to outside": (linked, bad_uri),
        "escaped dots": (lambda: written(good, uri=f"{uri}/%2e%2e/outside.safetensors"), bad_uri),
        "another host": (lambda: written(good, uri="file://elsewhere/x"), bad_uri),
        "another scheme": (lambda: written(good, uri="http://localhost/x"), bad_uri),
        "a null byte": (lambda: written(good, uri=f"{uri}/%00"), bad_uri),
        "another model's": (lambda: replace(written(good), fingerprint="f" * 64), mismatch),
        "a name missing": (lambda: written({k: v for k, v in good.items() if k != name}), mismatch),
        "a name too many": (lambda: written(good | {"x": torch.zeros(1)}), mismatch),
        "another shape": (lambda: written(good | {name: torch.zeros(2, 2)}), mismatch),
        "nan": (lambda: written(good | {name: poisoned}), mismatch),
        "integers": (lambda: written(good | {name: good[name].to(torch.int32)}), mismatch),
        "no adapter": (lambda: written(good, kind=WeightsKind.LORA), Reason.WEIGHTS_NOT_FOUND),
        "version 0": (lambda: written(good, policy_version=0), Reason.INVALID_FIELD),
        "no checksum": (lambda: written(good, sha256="abc"), Reason.INVALID_FIELD),
    }
    for case, (make, reason) in cases.items():
        with pytest.raises(DomainError) as caught:
            await policy.client.update_weights(make())
        assert caught.value.reason is reason, f"{case}: {caught.value}"
        [row] = (await policy.client.score([PROMPT], 1.0)).log_probs
        assert row == pytest.approx(plain_log_probs(reference(), PROMPT), abs=1e-4), case
    await serves(policy, reference(), 0)
    await update(policy, written(good))
    await serves(policy, build_model(1), 1)


async def test_without_a_weights_folder_nothing_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    async with running("batched") as policy:
        await refused(policy, published(policy, tmp_path, build_model(1), 1), Reason.BAD_WEIGHTS_URI)


async def test_a_call_waits_for_the_version_that_it_asks_for(policy: Running, tmp_path: Path) -> None:
    weights = published(policy, tmp_path, build_model(1), 1)
    with pytest.raises(DomainError) as caught:
        await policy.client.generate(PROMPT, SamplingParams(), CallOptions(min_policy_version=1))
    assert caught.value.reason is Reason.POLICY_VERSION_TOO_OLD and caught.value.metadata["policy_version"] == "0"
    options = CallOptions(min_policy_version=1, version_wait=60.0)
    waiting: list[asyncio.Future[Any]] = [
        asyncio.ensure_future(policy.client.generate(PROMPT, SamplingParams(max_tokens=2), options)),
        asyncio.ensure_future(policy.client.score([PROMPT], 1.0, options)),
    ]
    await asyncio.sleep(0.1)
    assert not any(call.done() for call in waiting)
    await update(policy, weights)
    completion, scored = await asyncio.gather(*waiting)
    assert completion.policy_versions[0].policy_version == scored.policy_version == 1


async def test_updates_under_load_never_mix_versions(policy: Running, tmp_path: Path) -> None:
    """Every token has the log-probability of the version that it is stamped with, prefixes that were cached included.

    An engine that changes its weights under way says where: a completion may have several spans.
    """
    models = {0: reference()} | {version: build_model(version) for version in (1, 2, 3)}
    published_weights = [published(policy, tmp_path, models[version], version) for version in (1, 2, 3)]
    answers: list[tuple[list[int], Any]] = []
    pause = asyncio.Event()

    async def call(number: int) -> None:
        count = 0
        while not pause.is_set():
            prompt = PROMPT[: 20 + (number + count) % 10]
            answers.append((prompt, await policy.client.generate(prompt, SamplingParams(max_tokens=1 + 2 * number))))
            count += 1

    async def more_answers() -> None:
        wanted = len(answers) + 8
        await until(lambda: len(answers) >= wanted)

    callers = [asyncio.create_task(call(number)) for number in range(8)]
    for weights in published_weights:
        await more_answers()
        await update(policy, weights)
    await more_answers()
    pause.set()
    await asyncio.gather(*callers)
    versions = set()
    for prompt, completion in answers[:: max(1, len(answers) // 150)]:
        start = 0
        for span in completion.policy_versions:
            end = start + span.token_count
            sequence = [*prompt, *completion.token_ids[:end]]
            expected = plain_log_probs(models[span.policy_version], sequence)[len(prompt) - 1 + start :]
            assert completion.log_probs[start:end] == pytest.approx(expected, abs=1e-4)
            versions.add(span.policy_version)
            start = end
        assert start == len(completion.token_ids)
    assert versions == {0, 1, 2, 3}


async def test_new_weights_need_a_greater_role_than_samples(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"weights_folder": tmp_path, "tokens_folder": write_tokens(tmp_path)}
    async with serving(EMBEDDED, **settings) as policy:
        fingerprint = policy.backend.model.fingerprint
        weights = full_weights(tmp_path / "w", build_model(1).state_dict(), 1, fingerprint)
        client = PolicyClient(Endpoint(policy.address, token=token_of(AccessRole.ACTOR)))
        assert (await client.generate(PROMPT, SamplingParams(max_tokens=1))).token_ids
        for call, role in (
            (partial(client.update_weights, weights), "trainer"),
            (partial(client.rollback, 0), "admin"),
        ):
            with pytest.raises(DomainError) as caught:
                await call()
            assert caught.value.reason is Reason.INSUFFICIENT_ROLE
            assert caught.value.metadata == {"role": "actor", "needed_role": role}
        await client.close()
        client = PolicyClient(Endpoint(policy.address, token=token_of(AccessRole.TRAINER)))
        await client.update_weights(weights)
        await client.close()


async def test_a_restarted_service_asks_for_its_weights_again(tmp_path: Path, services: ServiceProcesses) -> None:
    """Without a state folder it forgets them."""
    process = services.start("policy", model=EMBEDDED, weights_folder=tmp_path, threads=1)
    client = PolicyClient(Endpoint(process.address, outage_seconds=60))
    fingerprint = (await client.info()).fingerprint
    weights = full_weights(tmp_path / "w", build_model(1).state_dict(), 7, fingerprint)
    await client.update_weights(weights)
    params = SamplingParams(max_tokens=4, seed=1)
    options = CallOptions(min_policy_version=7)
    before = await client.generate(PROMPT, params, options)
    process.restart()
    with pytest.raises(DomainError) as caught:
        await client.generate(PROMPT, params, options)
    assert caught.value.reason is Reason.POLICY_VERSION_TOO_OLD and caught.value.metadata["policy_version"] == "0"
    await client.update_weights(weights)
    assert (await client.generate(PROMPT, params, options)).token_ids == before.token_ids
    await client.close()
    assert process.stop() == 0
