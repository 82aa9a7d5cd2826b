"""The policy that a run trains: its versions, how weights reach it, and what ends the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import (
    CallOptions,
    Feature,
    LoraLimits,
    Message,
    PublishedWeights,
    Role,
    SamplingParams,
    WeightsKind,
)
from mulligan.trainer.preflight import check_actor, check_other, check_top_k
from mulligan.trainer.sampling import ForeignWeights, NamedPolicy, PublishedPolicy, VersionLost
from mulligan.trainer.settings import LoraSettings, RunSettings, TrainedModelSettings
from tests.support.fakes import FakeLearner, FakePolicy

PROMPT = (Message(Role.USER, "say"),)
ALL = frozenset(Feature)
notices: list[str] = []


async def policies(*, upload: bool = False, **changes: Any) -> tuple[FakePolicy, PublishedPolicy]:
    fake = FakePolicy(lambda system, last, sampling: "said", **changes)
    actor = await NamedPolicy.open(fake, "actor")
    return fake, PublishedPolicy(actor, FakeLearner(), notices.append, fake.upload_weights if upload else None)


async def test_every_call_asks_for_the_version_that_was_published() -> None:
    fake, policy = await policies()
    assert (await policy.publish(), await policy.publish()) == (1, 2)
    await policy.generate(PROMPT, SamplingParams(), CallOptions(request_id="r", session_id="s"))
    assert fake.options == [CallOptions(policy="actor", request_id="r", session_id="s", min_policy_version=2)]
    assert all(weights.canary for weights in fake.updates), "the policy gets what the learner's forward pass says"


async def test_an_engine_without_seeds_is_asked_without() -> None:
    for features, seed in ((ALL, 7), (ALL - {Feature.SEED}, None)):
        fake, policy = await policies(features=features)
        await policy.publish()
        await policy.generate(PROMPT, SamplingParams(seed=7))
        assert [sampling.seed for _, sampling in fake.calls] == [seed]


async def test_the_canarys_difference_is_kept() -> None:
    fake, policy = await policies()
    fake.canary_difference = 2e-6
    await policy.publish()
    assert policy.canary_difference == 2e-6


async def test_weights_are_uploaded_where_no_file_system_is_shared() -> None:
    fake, policy = await policies(upload=True)
    await policy.publish()
    assert fake.uploads == [Path("/w 1")] and fake.updates[0].uri == "upload://1"
    fake.version = 0
    await policy.generate(PROMPT, SamplingParams())
    assert fake.updates[1].uri == "upload://2", "a URI is for one update"


async def test_no_number_is_given_again_whose_file_must_stay() -> None:
    fake, policy = await policies()
    policy.keeps = (4,)
    assert await policy.publish() == 5
    fake.version = 0  # it forgot its versions
    policy.keeps = ()
    assert await policy.publish() == 6


async def test_a_new_run_goes_on_above_all_versions_that_ever_were() -> None:
    fake, policy = await policies()
    fake.version = 5
    fake.withdrawn = {6, 7}
    assert await policy.publish() == 8


async def test_a_rollback_ends_the_run_that_trains_the_policy() -> None:
    fake, policy = await policies()
    await policy.publish()
    await policy.publish()
    fake.version = 1
    fake.withdrawn = {2}
    said = r"VERSION_CONFLICT: version 2.*rolled back.*`mulligan resume RUN`"
    with pytest.raises(DomainError, match=said):
        await policy.publish()
    with pytest.raises(VersionLost, match=said):
        await policy.generate(PROMPT, SamplingParams())
    assert fake.version == 1, "what an administrator decided stays"


async def test_a_forgetful_policy_gets_the_next_version() -> None:
    fake, policy = await policies()
    await policy.publish()
    fake.version = 0
    assert await policy.publish() == 2


async def test_versions_of_somebody_else_are_not_published_over() -> None:
    fake, policy = await policies()
    await policy.publish()
    fake.version = 9
    with pytest.raises(ForeignWeights, match="version 9, but this run published 1"):
        await policy.publish()


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (Reason.CANARY_FAILED, "difference 3.2.*serves the version before.*mulligan resume"),
        (Reason.MODEL_MISMATCH, "difference 3.2$"),
        (Reason.BAD_WEIGHTS_URI, 'weights_transfer to "upload"'),
        (Reason.ENGINE_UNAVAILABLE, "difference 3.2$"),
    ],
)
async def test_what_a_policy_refuses_says_what_to_do(
    reason: Reason, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, policy = await policies()

    async def refuses(weights: PublishedWeights, policy: str = "") -> float | None:
        raise DomainError(reason, "difference 3.2", policy_version=4)

    monkeypatch.setattr(fake, "update_weights", refuses)
    with pytest.raises(DomainError, match=words) as caught:
        await policy.publish()
    assert (caught.value.reason, caught.value.metadata) == (reason, {"policy_version": "4"})
    assert policy.version == 0


async def test_the_cause_of_a_refusal_is_told_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """That another model serves only where it does; what the engine says stands alone otherwise."""
    fake, policy = await policies()
    reason = Reason.MODEL_MISMATCH

    async def refuses(weights: PublishedWeights, policy: str = "") -> float | None:
        raise DomainError(reason, "SGLang refuses the weights")

    monkeypatch.setattr(fake, "update_weights", refuses)
    with pytest.raises(DomainError, match=r"^MODEL_MISMATCH: SGLang refuses the weights$"):
        await policy.publish()
    fake.fingerprint = "another"
    with pytest.raises(DomainError, match=r"given another model: .*mulligan policy load"):
        await policy.publish()
    reason = Reason.CANARY_FAILED
    fake.dtype = "float32"
    actor = await NamedPolicy.open(fake, "actor")
    adapter = FakeLearner(kind=WeightsKind.LORA)
    full = FakeLearner()
    with pytest.raises(DomainError, match="the dtypes differ: the policy computes in float32, this run in bfloat16"):
        await PublishedPolicy(actor, adapter, notices.append, dtype="bfloat16").publish()
    for learner, dtype in ((adapter, "float32"), (full, "bfloat16")):  # of full weights the policy says it itself
        with pytest.raises(DomainError) as caught:
            await PublishedPolicy(actor, learner, notices.append, dtype=dtype).publish()
        assert "dtypes" not in caught.value.message


RUN = RunSettings(environment="e", model=TrainedModelSettings(source="our/model"))
LORA = RUN.model_copy(update={"model": TrainedModelSettings(source="our/model", lora=LoraSettings(rank=2))})


@pytest.mark.parametrize(
    ("without", "settings", "field"),
    [
        (Feature.TOKEN_IDS, RUN, "policies.actor"),
        (Feature.LOG_PROBS, RUN, "policies.actor"),
        (Feature.FULL_WEIGHTS, RUN, "policies.actor"),
        (Feature.LORA_WEIGHTS, LORA, "policies.actor"),
        (Feature.TOP_K, RUN, "evaluation.top_k"),
    ],
)
async def test_a_policy_that_cannot_be_trained_is_refused(without: Feature, settings: RunSettings, field: str) -> None:
    info = await FakePolicy(lambda system, last, sampling: "").info()
    check_actor(info, settings, "f")
    with pytest.raises(DomainError) as caught:
        check_actor(replace(info, features=ALL - {without}), settings, "f")
    assert (caught.value.reason, caught.value.metadata) == (Reason.INVALID_SETTING, {"field": field})
    assert str(without) in caught.value.message


async def test_what_is_not_needed_is_not_asked_for() -> None:
    info = await FakePolicy(lambda system, last, sampling: "").info()
    check_actor(replace(info, features=ALL - {Feature.LORA_WEIGHTS, Feature.SCORE}), RUN, "f")
    check_actor(replace(info, features=ALL - {Feature.FULL_WEIGHTS}), LORA, "f")
    check_top_k(replace(info, features=frozenset()), 0, "top_k")


@pytest.mark.parametrize(
    ("dtype", "engine", "tolerance", "passes"),
    [
        ("float32", "float32", 1e-3, True),
        ("bfloat16", "bfloat16", 0.25, True),
        ("float32", "bfloat16", 0.25, True),
        ("float32", "float16", 0.25, True),
        ("bfloat16", "float32", 1e-3, False),
        ("float32", "bfloat16", 1e-3, False),
        ("bfloat16", "float32", 0.25, True),
        ("bfloat16", "", 1e-3, True),
        ("bfloat16", "float32", None, True),
    ],
)
async def test_dtypes_whose_rounding_the_canary_refuses_are_refused_before_the_run(
    dtype: Literal["float32", "bfloat16"], engine: str, tolerance: float | None, passes: bool
) -> None:
    info = await FakePolicy(lambda system, last, sampling: "").info()
    info = replace(info, dtype=engine, canary_tolerance=tolerance)
    settings = RUN.model_copy(update={"model": TrainedModelSettings(dtype=dtype)})
    if passes:
        check_actor(info, settings, "f")
        return
    with pytest.raises(DomainError, match=f"model.dtype: the dtypes differ: .*expected {engine}") as caught:
        check_actor(info, settings, "f")
    assert (caught.value.reason, caught.value.metadata) == (Reason.INVALID_SETTING, {"field": "model.dtype"})


async def test_adapters_that_the_engine_has_no_room_for_are_refused_before_the_run() -> None:
    info = await FakePolicy(lambda system, last, sampling: "").info()
    info = replace(info, lora=LoraLimits(8, ("k_proj", "q_proj")), backend="sglang")

    def settings(rank: int) -> RunSettings:
        return RUN.model_copy(update={"model": TrainedModelSettings(lora=LoraSettings(rank=rank))})

    check_actor(info, settings(8), "f", ("q_proj",))
    check_actor(info, RUN, "f")
    check_actor(replace(info, lora=LoraLimits()), settings(64), "f", ("down_proj",))
    for rank, layers, field, words in (
        (9, ("q_proj",), "model.lora.rank", "rank 8 at most, and this run's has 9.*--max-lora-rank"),
        (
            8,
            ("q_proj", "up_proj"),
            "model.lora.target_modules",
            "k_proj, q_proj alone, and this run's has up_proj, too",
        ),
    ):
        with pytest.raises(DomainError, match=f"{field}: .*{words}") as caught:
            check_actor(info, settings(rank), "f", layers)
        assert (caught.value.reason, caught.value.metadata) == (Reason.INVALID_SETTING, {"field": field})


async def test_another_model_is_refused_by_name() -> None:
    info = await FakePolicy(lambda system, last, sampling: "").info()
    with pytest.raises(DomainError, match=r"serves fake, and this run trains our/model.*policy load actor") as caught:
        check_actor(info, RUN, "another fingerprint")
    assert caught.value.reason is Reason.MODEL_MISMATCH
    with pytest.raises(DomainError, match="frozen"):
        check_actor(replace(info, frozen=True), RUN, "f")


async def test_the_actor_is_no_reflector_of_its_own() -> None:
    fake = FakePolicy(lambda system, last, sampling: "")
    with pytest.raises(DomainError, match="leave it empty, then the actor writes") as caught:
        check_other("reflector", await fake.info("actor"), await fake.info(""), "the actor writes")
    assert caught.value.metadata == {"field": "policies.reflector"}
