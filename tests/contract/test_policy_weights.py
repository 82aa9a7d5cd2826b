"""Updates of a policy's weights: verified completely, applied between requests, and never mixed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from models.build import build_model, write_untrained
from services.common.channel import Endpoint
from services.common.errors import DomainError, Reason
from services.common.types import PublishedWeights, SamplingParams, WeightsKind
from services.policy.client import PolicyClient
from tests.support.policy import Serving, full_weights, load, plain_log_probs, serving, sha256
from tests.support.processes import Services

PROMPT = list(range(7, 37))
SETTINGS: dict[str, Any] = {"context_length": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("model"))


def fingerprint_of(policy: Serving) -> str:
    return policy.backend.info.fingerprint


async def serves(policy: Serving, reference: Any, version: int) -> None:
    """This version answers, with the log-probabilities of this model."""
    completion = await policy.client.generate(PROMPT, SamplingParams(max_tokens=6), min_policy_version=version)
    expected = plain_log_probs(reference, [*PROMPT, *completion.token_ids])[len(PROMPT) - 1 :]
    assert completion.log_probs == pytest.approx(expected, abs=1e-4)
    assert [span.policy_version for span in completion.policy_versions] == [version]
    scores, scored_by = await policy.client.score([PROMPT], 1.0)
    assert scored_by == version and scores[0] == pytest.approx(plain_log_probs(reference, PROMPT), abs=1e-4)
    assert (await policy.client.info()).policy_version == version


async def test_full_weights_replace_all_and_forget_what_was_cached(model: Path, tmp_path: Path) -> None:
    async with serving(model, weights_folder=tmp_path, **SETTINGS) as policy:
        await serves(policy, load(model), 0)
        for version in (1, 5):
            other = build_model(version)
            weights = full_weights(
                tmp_path / f"{version}.safetensors", other.state_dict(), version, fingerprint_of(policy)
            )
            await policy.client.update_weights(weights)
            await serves(policy, other, version)
            await policy.client.update_weights(weights)  # a retry changes nothing
        for conflicting in (
            replace(weights, sha256="0" * 64),
            replace(weights, policy_version=4),
            replace(weights, policy_version=1),
        ):
            await refused(policy, conflicting, Reason.VERSION_CONFLICT)
        await serves(policy, other, 5)


async def refused(policy: Serving, weights: PublishedWeights, reason: Reason) -> None:
    with pytest.raises(DomainError) as caught:
        await policy.client.update_weights(weights)
    assert caught.value.reason is reason, str(caught.value)


async def test_bad_weights_are_refused_before_anything_is_touched(model: Path, tmp_path: Path) -> None:
    inside = tmp_path / "weights"
    inside.mkdir()
    good = build_model(1).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    async with serving(model, weights_folder=inside, **SETTINGS) as policy:

        def written(tensors: dict[str, torch.Tensor], **changes: Any) -> PublishedWeights:
            return full_weights(inside / "weights.safetensors", tensors, 1, fingerprint_of(policy), **changes)

        def truncated() -> PublishedWeights:
            weights = written(good)
            path = inside / "weights.safetensors"
            path.write_bytes(path.read_bytes()[:-100])
            return replace(weights, sha256=sha256(path))

        def outside() -> PublishedWeights:
            return full_weights(tmp_path / "outside.safetensors", good, 1, fingerprint_of(policy))

        def linked() -> PublishedWeights:
            (inside / "link").symlink_to(tmp_path / "outside.safetensors")
            return replace(outside(), uri=(inside.resolve() / "link").as_uri())

        poisoned = good[name].clone()
        poisoned[3, 4] = float("nan")
        cases: dict[str, tuple[Callable[[], PublishedWeights], Reason]] = {
            "corrupt": (truncated, Reason.MODEL_MISMATCH),
            "other checksum": (lambda: written(good, sha256="a" * 64), Reason.CHECKSUM_MISMATCH),
            "absent": (lambda: written(good, uri=(inside / "none").as_uri()), Reason.WEIGHTS_NOT_FOUND),
            "a folder": (lambda: written(good, uri=f"{inside.as_uri()}/sub/.."), Reason.BAD_WEIGHTS_URI),
            "above": (lambda: written(good, uri=f"{inside.as_uri()}/../outside.safetensors"), Reason.BAD_WEIGHTS_URI),
            "outside": (outside, Reason.BAD_WEIGHTS_URI),
            "a link to outside": (linked, Reason.BAD_WEIGHTS_URI),
            "escaped dots": (
                lambda: written(good, uri=f"{inside.as_uri()}/%2e%2e/outside.safetensors"),
                Reason.BAD_WEIGHTS_URI,
            ),
            "another host": (lambda: written(good, uri="file://elsewhere/x"), Reason.BAD_WEIGHTS_URI),
            "another scheme": (lambda: written(good, uri="http://localhost/x"), Reason.BAD_WEIGHTS_URI),
            "a null byte": (lambda: written(good, uri=f"{inside.as_uri()}/%00"), Reason.BAD_WEIGHTS_URI),
            "another model's": (lambda: replace(written(good), fingerprint="f" * 64), Reason.MODEL_MISMATCH),
            "a name missing": (lambda: written({k: v for k, v in good.items() if k != name}), Reason.MODEL_MISMATCH),
            "a name too many": (lambda: written(good | {"x": torch.zeros(1)}), Reason.MODEL_MISMATCH),
            "another shape": (lambda: written(good | {name: torch.zeros(2, 2)}), Reason.MODEL_MISMATCH),
            "nan": (lambda: written(good | {name: poisoned}), Reason.MODEL_MISMATCH),
            "integers": (lambda: written(good | {name: good[name].to(torch.int32)}), Reason.MODEL_MISMATCH),
            "no adapter": (lambda: written(good, kind=WeightsKind.LORA), Reason.WEIGHTS_NOT_FOUND),
            "version 0": (lambda: written(good, policy_version=0), Reason.INVALID_FIELD),
            "no checksum": (lambda: written(good, sha256="abc"), Reason.INVALID_FIELD),
        }
        before = await policy.client.score([PROMPT], 1.0)
        for case, (make, reason) in cases.items():
            with pytest.raises(DomainError) as caught:
                await policy.client.update_weights(make())
            assert caught.value.reason is reason, f"{case}: {caught.value}"
            assert await policy.client.score([PROMPT], 1.0) == before, case
        await policy.client.update_weights(written(good))
        await serves(policy, build_model(1), 1)


async def test_without_a_weights_folder_nothing_is_loaded(model: Path, tmp_path: Path) -> None:
    async with serving(model, **SETTINGS) as policy:
        weights = full_weights(tmp_path / "w", build_model(1).state_dict(), 1, fingerprint_of(policy))
        await refused(policy, weights, Reason.BAD_WEIGHTS_URI)


def adapter(model: Path, folder: Path, targets: list[str], seed: int, **settings: Any) -> Any:
    """A LoRA adapter that changes something, saved by peft, and the model with it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    tuned = get_peft_model(load(model), config)
    for parameter_name, parameter in tuned.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(folder)
    return tuned.eval()


def adapter_weights(folder: Path, version: int, fingerprint: str) -> PublishedWeights:
    checksum = sha256(folder / "adapter_model.safetensors")
    return PublishedWeights(version, WeightsKind.LORA, folder.resolve().as_uri(), checksum, fingerprint)


async def test_an_adapter_is_merged_into_the_weights_the_model_came_with(model: Path, tmp_path: Path) -> None:
    """Whatever was served before: another adapter of other layers, or full weights."""
    async with serving(model, weights_folder=tmp_path, **SETTINGS) as policy:
        fingerprint = fingerprint_of(policy)
        first = adapter(model, tmp_path / "a", ["q_proj", "v_proj", "o_proj"], 1)
        second = adapter(model, tmp_path / "b", ["down_proj"], 2, use_rslora=True)
        await policy.client.update_weights(adapter_weights(tmp_path / "a", 1, fingerprint))
        await serves(policy, first, 1)
        await policy.client.update_weights(adapter_weights(tmp_path / "b", 2, fingerprint))
        await serves(policy, second, 2)
        other = build_model(3)
        await policy.client.update_weights(full_weights(tmp_path / "w", other.state_dict(), 3, fingerprint))
        await serves(policy, other, 3)
        await policy.client.update_weights(adapter_weights(tmp_path / "a", 4, fingerprint))
        await serves(policy, first, 4)
        await policy.client.update_weights(adapter_weights(tmp_path / "a", 5, fingerprint))
        await serves(policy, first, 5)
        assert isinstance(first, PeftModel)


async def test_adapters_that_are_not_plain_lora_are_refused(model: Path, tmp_path: Path) -> None:
    async with serving(model, weights_folder=tmp_path, **SETTINGS) as policy:
        adapter(model, tmp_path / "dora", ["q_proj"], 1, use_dora=True)
        adapter(model, tmp_path / "saved", ["q_proj"], 1, modules_to_save=["lm_head"])
        adapter(model, tmp_path / "edited", ["q_proj"], 1)
        await refused(policy, adapter_weights(tmp_path / "dora", 1, fingerprint_of(policy)), Reason.MODEL_MISMATCH)
        await refused(policy, adapter_weights(tmp_path / "saved", 1, fingerprint_of(policy)), Reason.MODEL_MISMATCH)
        config = tmp_path / "edited" / "adapter_config.json"
        for change in ({"alpha_pattern": {"q_proj": 3}}, {"bias": "all"}, {"lora_alpha": None}):
            config.write_text(json.dumps({"lora_alpha": 8} | change))
            await refused(
                policy, adapter_weights(tmp_path / "edited", 1, fingerprint_of(policy)), Reason.MODEL_MISMATCH
            )
        config.unlink()
        await refused(policy, adapter_weights(tmp_path / "edited", 1, fingerprint_of(policy)), Reason.WEIGHTS_NOT_FOUND)
        await serves(policy, load(model), 0)


async def test_updates_under_load_never_mix_versions(model: Path, tmp_path: Path) -> None:
    """Every completion is wholly of the version it is stamped with, prefixes that were cached before included."""
    references = {0: load(model)} | {version: build_model(version) for version in (1, 2, 3)}
    answers: list[tuple[list[int], Any]] = []
    async with serving(model, weights_folder=tmp_path, **SETTINGS) as policy:
        running = True

        async def call(number: int) -> None:
            count = 0
            while running:
                prompt = PROMPT[: 20 + (number + count) % 10]
                params = SamplingParams(max_tokens=1 + number, seed=count)
                answers.append((prompt, await policy.client.generate(prompt, params)))
                count += 1

        callers = [asyncio.create_task(call(number)) for number in range(8)]
        for version in (1, 2, 3):
            await asyncio.sleep(0.3)
            tensors = references[version].state_dict()
            weights = full_weights(tmp_path / f"{version}", tensors, version, fingerprint_of(policy))
            await policy.client.update_weights(weights)
        await asyncio.sleep(0.3)
        running = False
        await asyncio.gather(*callers)
    for prompt, completion in answers[:: max(1, len(answers) // 100)]:
        [span] = completion.policy_versions
        assert span.token_count == len(completion.token_ids)
        expected = plain_log_probs(references[span.policy_version], [*prompt, *completion.token_ids])
        assert completion.log_probs == pytest.approx(expected[len(prompt) - 1 :], abs=1e-4)
    assert {completion.policy_versions[0].policy_version for _, completion in answers} == {0, 1, 2, 3}


async def test_weights_have_a_credential_of_their_own(model: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"weights_folder": tmp_path, "token": "everyone", "admin_token": "trainer"}
    async with serving(model, **settings) as policy:
        weights = full_weights(tmp_path / "w", build_model(1).state_dict(), 1, fingerprint_of(policy))
        for endpoint_token, admin_token, allowed in (
            (None, "trainer", (False, True)),
            ("everyone", None, (True, False)),
            ("trainer", "everyone", (False, False)),
            ("everyone", "trainer", (True, True)),
        ):
            client = PolicyClient(Endpoint(policy.address, token=endpoint_token), admin_token=admin_token)
            for call, ok in zip((client.info, lambda: client.update_weights(weights)), allowed, strict=True):  # noqa: B023
                if ok:
                    await call()
                else:
                    with pytest.raises(DomainError) as caught:
                        await call()
                    assert caught.value.reason is Reason.BAD_CREDENTIAL
            await client.close()


async def test_a_restarted_service_asks_for_its_weights_again(model: Path, tmp_path: Path, services: Services) -> None:
    process = services.start("policy", model=model, weights_folder=tmp_path, threads=1)
    client = PolicyClient(Endpoint(process.address, outage_seconds=60))
    fingerprint = (await client.info()).fingerprint
    weights = full_weights(tmp_path / "w", build_model(1).state_dict(), 7, fingerprint)
    await client.update_weights(weights)
    params = SamplingParams(max_tokens=4, seed=1)
    before = await client.generate(PROMPT, params, min_policy_version=7)
    process.restart()
    with pytest.raises(DomainError) as caught:
        await client.generate(PROMPT, params, min_policy_version=7)
    assert caught.value.reason is Reason.POLICY_VERSION_TOO_OLD and caught.value.metadata["policy_version"] == "0"
    await client.update_weights(weights)
    assert (await client.generate(PROMPT, params, min_policy_version=7)).token_ids == before.token_ids
    await client.close()
    assert process.stop() == 0
